"""Groups of layers as functions of tensors give what the layers give; recording them is test_graphs_gpu.py's."""

import pytest
import torch
from torch import Tensor

from megatron_taipan.model.graphs import split_where_graphs_end
from megatron_taipan.model.taipan import Taipan
from tests.model.small import documents, small_config, tokens


def unrecorded(functions: tuple, _: tuple) -> tuple:
    """In the place of torch.cuda.make_graphed_callables: as there, every output comes out of one autograd function."""
    return tuple(lambda *given, run=run: Through.apply(*run(*given)) for run in functions)


class Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *outputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.clone() for t in outputs)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, ...]:
        return gradients


def outcome(model: Taipan) -> tuple[Tensor, Tensor, list[Tensor]]:
    given = {"labels": tokens(2, 20, 1), "seq_idx": documents(6, 14).expand(2, -1), "step": torch.tensor(3)}
    out = model(tokens(2, 20), samples=torch.tensor([3, 8]), **given)
    out.loss.backward()
    assert not out.metrics.requires_grad
    return out.loss.detach(), out.metrics, [p.grad for p in model.parameters()]


@pytest.mark.parametrize(
    ("pattern", "lengths"),
    [
        ("(M*6 S)*5", [7] * 5), ("(M*3 S)*3", [4] * 3), ("M*24", [7, 7, 7, 3]), ("A*10", [4, 4, 2]),
        ("S M*5 W S A W A M", [7, 4, 1]), ("M S", [2]),
    ],
)  # fmt: skip
def test_layers_are_grouped_by_what_ends_a_graph_and_not_one_by_one(pattern, lengths):
    with torch.device("meta"):
        layers = list(Taipan(small_config(pattern)).layers)
    groups = split_where_graphs_end(layers)
    assert [len(group) for group in groups] == lengths and sum(groups, []) == layers


def test_groups_give_what_their_layers_give(monkeypatch):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", unrecorded)
    config = small_config("M*3 S M*9 S W M")  # groups of 4, 7, 4 layers and one, of which two have no gate
    loss, metrics, grads = outcome(Taipan(config, seed=1))
    grouped = Taipan(config, seed=1)
    grouped.capture(2, 20)
    assert len(grouped.graphs.groups) == 4
    again, remeasured, regrads = outcome(grouped)
    assert torch.equal(loss, again) and torch.equal(metrics, remeasured) and metrics.shape == (10,)
    assert all(torch.equal(a, b) for a, b in zip(grads, regrads, strict=True))


def test_a_group_leaves_the_stream_where_the_next_one_reads_it(monkeypatch):
    """So that a replay finds its input in place and copies nothing."""
    shared = []

    def compare(functions: tuple, examples: tuple) -> tuple:
        for run, given, after in zip(functions[:-1], examples[:-1], examples[1:], strict=True):
            shared.append(run(*given)[0].data_ptr() in {t.data_ptr() for t in after})
        return functions

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", compare)
    Taipan(small_config("M*3 S M*9 S W M"), seed=1).capture(2, 20)
    assert shared == [True] * 3
