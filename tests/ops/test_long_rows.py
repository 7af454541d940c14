"""Rows of a million tokens and more: offsets beyond 32 bits, and grids within a GPU's limits.

On a GPU, or in Triton's interpreter with TRITON_INTERPRET=1. Memory is not filled: the tokens far apart are few,
and the grids are not launched.
"""

import importlib
import itertools
import pkgutil

import pytest
import torch

from megatron_taipan import ops
from megatron_taipan.ops.selected_rows import Rows
from tests.ops.devices import DEVICES, interpreted_only

pytest.importorskip("triton")

device = pytest.mark.parametrize("device", DEVICES)
TOKENS = 193  # four chunks of the scan, the last one of a single token
STRIDE = 2**31 // 192 // 16 * 16 + 16  # the last token is beyond 2^31 elements
LONG = 8 * 2**20 + 3


def far_apart(device: str):
    """A function that gives the same numbers [1, TOKENS, ...] or [TOKENS, ...], tokens STRIDE elements apart, side by
    side with those that it gave before: they share one buffer, of which few pages are touched."""
    assert (TOKENS - 1) * STRIDE >= 2**31
    buffer, column = torch.empty(TOKENS * STRIDE, device=device), itertools.count(0, 64)

    def place(x: torch.Tensor) -> torch.Tensor:
        row = x[0] if x.shape[0] == 1 else x
        inner = torch.empty(row.shape[1:]).stride()
        assert row[0].numel() <= 64
        wide = buffer.as_strided(row.shape, (STRIDE, *inner), next(column)).copy_(row)
        return wide[None] if x.shape[0] == 1 else wide

    return place


def numbers(*shape: int, device: str) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


def conv(place, device):
    from megatron_taipan.ops.causal_conv1d_triton import conv_backward, conv_forward

    x, dy = (place(numbers(1, TOKENS, 20, device=device) * k) for k in (1, 2))
    weight, bias, dx = numbers(20, 4, device=device), numbers(20, device=device), place(torch.zeros_like(x))
    return conv_forward(x, weight, bias, None, None), *conv_backward(dy, x, weight, bias, None, None, dx), dx


def scan(place, device):
    from megatron_taipan.ops.ssd_backward_triton import scan_backward
    from megatron_taipan.ops.ssd_forward_triton import prepare_decay, scan_forward, scan_states

    x, dy = (place(numbers(1, TOKENS, 2, 16, device=device) * k) for k in (1, 2))
    B, C = (place(numbers(1, TOKENS, 1, 16, device=device) * k) for k in (1, 2))
    A, D = -torch.ones(2, device=device), torch.ones(2, device=device)
    decays = prepare_decay(place(numbers(1, TOKENS, 2, device=device)), torch.zeros(2, device=device), A, None)
    y, states, final = scan_forward(x, decays, B, C, D, None, keep=2)
    every = scan_states(x, decays, B, states, 2)
    dx, dB, dC, ddt = (place(torch.zeros_like(t)) for t in (x, B, C, decays.cum[..., :TOKENS].transpose(1, 2)))
    sums = scan_backward(dy, x, decays, A, B, C, D, every, None, dx=dx, ddt=ddt, dB=dB, dC=dC, softplus=True)
    return y, final, every, dx, dB, dC, ddt, *sums


def selected_rows(place, device):
    from megatron_taipan.ops import selected_rows_triton as kernels

    x, weight = place(numbers(TOKENS, 32, device=device)), numbers(16, 32, device=device)
    index = torch.tensor([0, 1, 100, 191, 192] + [0] * (TOKENS - 5), device=device)
    rows = Rows(index, torch.tensor(5, dtype=torch.int32, device=device))
    copied = kernels.copy_rows(x, torch.zeros(TOKENS, 32, device=device), rows, scatter=False)
    back = kernels.copy_rows(copied, place(torch.zeros_like(x)), rows, scatter=True)
    product = torch.zeros(TOKENS, 16, device=device)
    kernels.rows_product(x, weight, rows, product, transposed=False, gather=True, scatter=False)
    onto = place(torch.zeros(TOKENS, 16, device=device))
    kernels.rows_product(x, weight, rows, onto, transposed=False, gather=True, scatter=True)
    return copied, back, product, onto, kernels.weight_gradient(product, x, rows, weight, gather=True)


def gated_norm(place, device):
    from megatron_taipan.ops.gated_norm_triton import gated_backward, gated_forward

    y, z, dout = (place(numbers(TOKENS, 32, device=device) * k) for k in (1, 2, 3))
    weight, dy, dz = numbers(32, device=device), place(torch.zeros_like(y)), place(torch.zeros_like(z))
    out, scale = gated_forward(y, z, weight, 1e-5, 16)
    return out, scale, gated_backward(dout, y, z, weight, scale, dy, dz), dy, dz


def gate_scores(place, device):
    from megatron_taipan.ops.gate_scores_triton import gate_scores

    u = place(numbers(TOKENS, 32, device=device)).requires_grad_()
    weight = numbers(2, 32, device=device).requires_grad_()
    logits, _ = gate_scores(u, weight, torch.zeros(2, device=device))
    return logits, *torch.autograd.grad(logits.square().sum(), (u, weight))


@device
@pytest.mark.parametrize("operation", [conv, scan, selected_rows, gated_norm, gate_scores])
def test_tokens_beyond_32_bits_are_found(device, operation):
    """Bit for bit as with the tokens side by side."""
    close, wide = operation(lambda t: t, device), operation(far_apart(device), device)
    assert all(a.isfinite().all() and a.abs().max() > 0 for a in close)
    assert [torch.equal(a, b) for a, b in zip(close, wide, strict=True)] == [True] * len(close)


@interpreted_only
def test_tiles_of_a_longer_row_compute_the_same(monkeypatch):
    """What a convolution of more than two million tokens takes."""
    from megatron_taipan.ops import causal_conv1d_triton as kernels

    assert [kernels.tokens_of_run(n, 32) for n in (0, 1, 32 * 65_535, 32 * 65_535 + 1, LONG)] == [32, 32, 32, 64, 256]
    usual = conv(lambda t: t, "cpu")
    monkeypatch.setattr(kernels, "tokens_of_run", lambda _, usual: 4 * usual)
    *same, dweight, dbias, dx = conv(lambda t: t, "cpu")
    assert all(torch.equal(a, b) for a, b in zip((*same, dx), (usual[0], usual[3]), strict=True))
    for a, b in ((dweight, usual[1]), (dbias, usual[2])):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_every_grid_of_a_row_of_eight_million_tokens_can_be_launched(monkeypatch):
    """Dimensions after the first end at 65,535 (CUDA's programming guide, technical specifications)."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    grids = []

    class Recorder:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            grids.append((self.name, grid))
            return lambda *args, **options: None

    for found in pkgutil.iter_modules(ops.__path__):
        if not found.name.endswith(("_triton", "_kernels")):
            continue
        module = importlib.import_module(f"megatron_taipan.ops.{found.name}")
        for name, value in list(vars(module).items()):
            if isinstance(value, (JITFunction, InterpretedFunction)) and name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(f"{found.name}.{name}"))
    make_long_launches()
    assert len({name for name, _ in grids}) == 19  # all that make_long_launches means to launch
    assert [(name, grid) for name, grid in grids if max(grid[1:], default=0) > 65_535] == []


def make_long_launches():
    """A training step's kernels with grids of more than one dimension, and some others, at LONG tokens; the memory is
    never touched."""
    from megatron_taipan.ops import causal_conv1d_triton as convolution
    from megatron_taipan.ops import gated_norm_triton as norms
    from megatron_taipan.ops import selected_rows_triton as selected
    from megatron_taipan.ops import ssd_backward_triton as backward
    from megatron_taipan.ops import ssd_forward_triton as forward
    from megatron_taipan.ops.gate_scores_triton import gate_scores
    from megatron_taipan.ops.interval_attention_triton import attention_backward, attention_forward

    def empty(*shape: int, dtype=torch.float32):
        return torch.empty(*shape, dtype=dtype)

    x, weight = empty(1, LONG, 4), empty(4, 4)
    convolution.conv_forward(x, weight, None, None, None)
    convolution.conv_backward(x, x, weight, empty(4), None, None, empty(1, LONG, 4))
    heads, group = empty(1, LONG, 1, 4), empty(1, LONG, 1, 4)
    decays = forward.prepare_decay(empty(1, LONG, 1), empty(1), empty(1), None)
    _, states, _ = forward.scan_forward(heads, decays, group, group, None, None, keep=1)
    backward.scan_backward(
        heads, heads, decays, empty(1), group, group, None, states, None, dx=heads, ddt=empty(1, LONG, 1), dB=group,
        dC=group, softplus=True,
    )  # fmt: skip
    rows = Rows(empty(LONG, dtype=torch.int64), torch.zeros((), dtype=torch.int32))
    selected.copy_rows(x[0], x[0], rows, scatter=False)
    selected.rows_product(x[0], weight, rows, x[0], transposed=False, gather=True, scatter=False)
    selected.weight_gradient(x[0], x[0], rows, weight, gather=True)
    _, scale = norms.gated_forward(x[0], x[0], empty(4), 1e-5, 4)
    norms.gated_backward(x[0], x[0], x[0], empty(4), scale, x[0], x[0])
    gate_scores(x[0], empty(2, 4), empty(2))
    q, lo = empty(LONG, 1, 16), torch.zeros(LONG, dtype=torch.int32)
    out, lse = attention_forward(q, q, q, lo, lo)
    attention_backward(out, q, q, q, out, lse, lo, lo)
