"""Activation checkpointing changes memory, not one bit of the result."""

import pytest
import torch
from torch import Tensor

from megatron_taipan.layer_kinds.selective import GATE_METRICS
from megatron_taipan.model.blocks import Block
from megatron_taipan.model.taipan import Taipan
from tests.model.small import documents, small_config, small_model, tokens

PATTERN = "M S W A M S"
GIVEN = {
    "labels": tokens(2, 20, 1),
    "seq_idx": documents(6, 14).expand(2, -1),
    "samples": torch.tensor([7, 3]),
    "step": 4,
}


def run(mode: str, every: int = 1, gradient: str = "selected") -> tuple[Tensor, list[Tensor], list[int]]:
    """Loss, gradients, and how often each layer ran."""
    model = Taipan(small_config(PATTERN, gate={"gradient": gradient}), seed=1, recompute=mode, recompute_every=every)
    runs = [0] * len(model.layers)
    for i, layer in enumerate(model.layers):

        def count(*_, i=i):
            runs[i] += 1

        layer.register_forward_pre_hook(count)
    out = model(tokens(2, 20), **GIVEN)
    out.loss.backward()
    assert out.metrics.shape == (2 * len(GATE_METRICS),)
    return out.loss.detach(), [p.grad for p in model.parameters()], runs


@pytest.mark.parametrize("gradient", ["selected", "all"])
@pytest.mark.parametrize(("mode", "every"), [("selective", 1), ("full", 1), ("full", 2), ("full", 4), ("full", 9)])
def test_losses_and_gradients_are_bit_equal(mode, every, gradient):
    loss, grads, once = run("none", gradient=gradient)
    again, regrads, twice = run(mode, every, gradient)
    assert once == [1] * 6 and twice == [2] * 6  # it was computed again, else this test shows nothing
    assert torch.equal(loss, again)
    for a, b in zip(grads, regrads, strict=True):
        assert torch.equal(a, b)


def saved_bytes(mode: str) -> int:
    """What the graph keeps between the passes."""
    model = Taipan(small_config(PATTERN), seed=1, recompute=mode)
    own = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in own:
            kept[t.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(tokens(2, 20), **GIVEN)
    total = sum(t.numel() * t.element_size() for t in kept.values())
    del out
    return total


def test_full_keeps_less_than_none():
    assert saved_bytes("full") < saved_bytes("none") / 3


def test_evaluation_recomputes_nothing():
    model = small_model("M S").eval()
    model.recompute = "full"
    with torch.no_grad():
        assert torch.equal(model(tokens(1, 9)).logits, small_model("M S").eval()(tokens(1, 9)).logits)


def test_operators_that_only_one_pass_needs_do_not_matter():
    """As ZeRO-3's hooks run them, which gather and free weights in the one pass and not in the other."""
    loss, grads, _ = run("none")
    runs = [0] * len(PATTERN.split())

    def count_then_free(module, _):
        index = module.layer
        runs[index] += 1
        if runs[index] == 2:
            torch.empty(3), torch.zeros(2, 2).t().contiguous().view(4)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: count_then_free(module, inputs) if isinstance(module, Block) else None
    )
    try:
        again, regrads, _ = run("selective")
    finally:
        handle.remove()
    assert runs == [2] * len(runs) and torch.equal(loss, again)
    for a, b in zip(grads, regrads, strict=True):
        assert torch.equal(a, b)
