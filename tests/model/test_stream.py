"""Where the additions to the residual stream happen, and that it does not matter for the result."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_taipan.model.context import make_context
from megatron_taipan.model.stack import run_layers
from megatron_taipan.model.stream import Stream
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.ops.dispatch import pick_ops
from tests.model.small import documents, small_config, small_model, tokens, told

PATTERN = "M S W A M S"
SEQ = documents(6, 14).expand(2, -1)


def context():
    return make_context(tokens(2, 20), SEQ, torch.tensor([7, 3]), 4, told())


def added_one_by_one(layers: torch.nn.ModuleList, h: Tensor) -> Tensor:
    """The layers with every addition made by torch where its summand is known."""
    for layer in layers:
        h = layer(Stream(h), context())[0].total()
    return h


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wide", [True, False])
def test_outstanding_additions_change_no_bit(dtype, wide):
    """Of the stream and of every gradient: the order of the sums is the same, and what is rounded."""
    model = small_model(PATTERN, dtype, residual_fp32=wide)
    h = torch.randn(2, 20, 24).to(torch.float32 if wide else dtype).requires_grad_()
    upstream, leaves = torch.randn(2, 20, 24).to(h.dtype), [h, *model.layers.parameters()]
    results = []
    for out in (run_layers(model.layers, h, context())[0], added_one_by_one(model.layers, h)):
        results.append([out, *torch.autograd.grad(out, leaves, upstream)])
    assert results[0][0].dtype == h.dtype
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("mode", "every", "first"),  # first: whether the first norm of each layer adds
    [("none", 1, [0, 1, 1, 1, 1, 1]), ("full", 2, [0, 1, 0, 1, 0, 1]), ("selective", 1, [0, 0, 0, 0, 0, 0])],
)
def test_norms_take_the_additions_between_layers_that_run_together(mode, every, first):
    given = []  # for every norm that takes the stream, in order: whether there was something to add

    def watch(h, branch, *more):
        given.append(branch is not None)
        return ops.add_rms_norm(h, branch, *more)

    ops = pick_ops("reference")
    model = Taipan(small_config(PATTERN), ops=replace(ops, add_rms_norm=watch), recompute=mode, recompute_every=every)
    model(tokens(2, 20), labels=tokens(2, 20, 1), seq_idx=SEQ)
    within = {"M": [], "S": [0], "W": [1], "A": [1]}  # S refines the stream, which is no addition
    wanted = [taken for n, letter in zip(first, PATTERN.split(), strict=True) for taken in (n, *within[letter])]
    assert given == wanted


@pytest.mark.parametrize("letter", ["M", "W", "A", "S"])
def test_a_decoded_token_leaves_its_addition_too(letter):
    """One token a row at a time, and in `forward`: the same kind of stream."""
    model = small_model(letter).eval()
    streams = []
    model.layers[0].register_forward_hook(lambda _, __, out: streams.append(out[0]))
    cache = model.new_cache(2)
    with torch.no_grad():
        model(tokens(2, 5), cache=cache)
        model.step(tokens(2, 1), cache)
    assert [s.branch.shape for s in streams] == [(2, 5, 24), (2, 1, 24)]
    assert all(s.h.shape == s.branch.shape for s in streams)
