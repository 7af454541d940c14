"""A selective layer through the kernels against float64 references, in each way that its queries are computed.

On a GPU, or in Triton's interpreter with TRITON_INTERPRET=1.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_taipan.model import attention
from megatron_taipan.model import gate as gate_module
from megatron_taipan.model.context import make_context
from megatron_taipan.model.stream import Stream
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.ops import dispatch
from megatron_taipan.ops.operations import reference_ops
from tests.model.small import selecting, small_config, told
from tests.ops.devices import DEVICES
from tests.ops.kernel_checks import TOLERANCE, error, poison

pytest.importorskip("triton")
B, L, D = 2, 90, 32


@pytest.fixture
def kernels(monkeypatch):
    """The kernels on any device, those that wait for a GPU included."""
    for module in (dispatch, attention, gate_module):
        monkeypatch.setattr(module, "takes_kernels", lambda x: x.dtype != torch.float64)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        return dispatch.pick_ops("auto", {"selection": "triton", "gate": "triton"})


def outcome(ops, device: str, dtype: torch.dtype, every: Tensor | None = None, **gate) -> list[Tensor]:
    """The layer's output, m's gradient, the input's and every parameter's; the same weights and input in each call."""
    sizes = {"n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "window": 20}
    config = small_config("S", d_model=D, gate={"capacity": 0.3, **gate}, attention=sizes)
    layer = Taipan(config, seed=1, ops=ops).layers[0].to(device, dtype)
    generator = torch.Generator().manual_seed(0)
    h, upstream = (torch.randn(B, L, D, generator=generator).to(device, dtype) for _ in range(2))
    h.requires_grad_()
    seq_idx = (torch.rand(B, L, generator=generator) < 0.04).cumsum(1).int().to(device)
    settings = told(**gate) if every is None else told(**gate)._replace(every_query=every.to(device))
    ctx = make_context(torch.zeros(B, L, dtype=torch.int64, device=device), seq_idx, None, 0, settings)
    if device == "cuda":
        poison()
    stream, selection = selecting(layer, Stream(h), ctx)
    out = stream.total()
    if device == "cuda":
        poison()
    grads = torch.autograd.grad(out, [selection.m, h, *layer.parameters()], upstream, allow_unused=True)
    return [selection.selected.double(), out, *(g for g in grads if g is not None)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", [{}, {"refinement": "add", "weight": "one"}], ids=["paper", "presets"])
@pytest.mark.parametrize("way", ["selected", "all", "all, one operation", "sampled, every", "sampled, few"])
def test_layer_equals_the_reference_with_gradients(kernels, device, recipe, way):
    mode = way.split(",")[0]
    ops = kernels if way == "all, one operation" else replace(kernels, every_query=None)
    assert kernels.every_query is not None
    every = {"sampled, every": torch.tensor(True), "sampled, few": torch.tensor(False)}.get(way)
    exact = "selected" if way in ("selected", "sampled, few") else "all"
    expected = outcome(reference_ops(), "cpu", torch.float64, gradient=exact, **recipe)
    got = outcome(ops, device, torch.float32, every, gradient=mode, **recipe)
    assert len(got) == len(expected) and 0.2 < expected[0].mean() < 0.8
    assert torch.equal(got[0].cpu(), expected[0])
    errors = [error(a.cpu(), b) for a, b in zip(got[1:], expected[1:], strict=True)]
    assert all(e < 5 * TOLERANCE[torch.float32] for e in errors), errors


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("bias", "share"), [(-60.0, 0), (60.0, 1)])
def test_one_operation_where_none_or_all_are_selected(kernels, device, bias, share):
    given = {"gradient": "all", "init_bias": bias}
    expected = outcome(reference_ops(), "cpu", torch.float64, **given)
    got = outcome(kernels, device, torch.float32, **given)
    assert expected[0].mean() == got[0].mean() == share
    for a, b in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(a.cpu().double(), b, rtol=1e-4, atol=1e-5)
