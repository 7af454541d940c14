"""RMSNorm with the residual stream's sum in Triton: on a GPU, or interpreted with TRITON_INTERPRET=1."""

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_taipan.ops.norms import add_rms_norm_reference, rms_norm_reference
from tests.ops.devices import DEVICES
from tests.ops.kernel_checks import TOLERANCE, error, poison

pytest.importorskip("triton")
HALF, WHOLE = torch.bfloat16, torch.float32
EPS = 1e-5


@pytest.fixture(params=DEVICES)
def device(request):
    if request.param == "cuda":
        poison()
    torch.manual_seed(0)
    return request.param


def contiguous(*shape: int, **kind: Any) -> Tensor:
    return torch.randn(*shape, **kind)


def wide_rows(*shape: int, **kind: Any) -> Tensor:
    """Rows that lie further apart than they are long."""
    return torch.randn(*shape[:-1], shape[-1] + 3, **kind)[..., : shape[-1]]


def across(*shape: int, **kind: Any) -> Tensor:
    """The last dimension is not the one whose elements adjoin."""
    return torch.randn(*shape[:-2], shape[-1], shape[-2], **kind).transpose(-1, -2)


def same(got: Tensor, expected: Tensor) -> bool:
    """Bit for bit; but the interpreter cuts bf16 off where a GPU rounds."""
    assert got.dtype == expected.dtype
    if not got.is_cuda and got.dtype == HALF:
        return error(got, expected) < 2**-7
    return torch.equal(got, expected)


@pytest.mark.parametrize(
    ("stream", "narrow", "has_branch"),
    [(WHOLE, HALF, True), (WHOLE, WHOLE, True), (HALF, HALF, True), (WHOLE, torch.float16, True), (WHOLE, HALF, False)],
)
@pytest.mark.parametrize(
    ("width", "laid"),
    [(1, contiguous), (48, wide_rows), (1001, across), (2048, contiguous), (2048, wide_rows)],
)
def test_sum_norm_and_gradients(device, width, stream, narrow, has_branch, laid):
    """The sum as torch rounds it, bit for bit; norm and gradients as float64 has them for that sum."""
    from megatron_taipan.ops.rms_norm_triton import add_rms_norm

    def made(dtype: torch.dtype) -> Tensor:
        return laid(3, 7, width, device=device, dtype=dtype)

    h, branch = made(stream).requires_grad_(), made(narrow).requires_grad_() if has_branch else None
    weight = torch.randn(width, device=device, dtype=narrow).requires_grad_()
    leaves = [t for t in (h, branch, weight) if t is not None]
    upstream = [made(narrow), made(stream)]  # of the norm, of the sum

    total = ((h + branch) if has_branch else h).detach()
    exact = [t.detach().double().requires_grad_() for t in (total, weight)]
    u64 = rms_norm_reference(*exact, EPS)
    dtotal, dweight = torch.autograd.grad((u64, exact[0]), exact, [t.double() for t in upstream])

    u, ours = add_rms_norm(h, branch, weight, EPS)
    dh, *between, dw = torch.autograd.grad((u, ours), leaves, upstream)
    assert same(ours, total) and dh.dtype == stream and u.dtype == dw.dtype == narrow
    assert error(u, u64) < TOLERANCE[narrow]
    assert error(dh, dtotal) < TOLERANCE[stream] and error(dw, dweight) < TOLERANCE[narrow]
    assert all(same(dbranch, dh.to(narrow)) for dbranch in between)  # as autograd's own sum has it


def test_more_rows_than_programs_and_gradients_that_are_one_number(device):
    """Every program walks over several rows; sum() gives expanded gradients, whose strides are 0."""
    from megatron_taipan.ops.rms_norm_triton import PROGRAMS, add_rms_norm

    rows = 2 * PROGRAMS + 5
    inputs = [t.to(device) for t in (torch.randn(rows, 33), torch.randn(rows, 33).to(HALF), torch.randn(33))]
    results = []
    for run, wide in ((add_rms_norm, False), (add_rms_norm_reference, True)):
        leaves = [(t.double() if wide else t.clone()).requires_grad_() for t in inputs]
        u, total = run(*leaves, EPS)
        results.append([u, total, *torch.autograd.grad(u.sum() + total.sum(), leaves)])
    limits = [2e-5, 2e-5, 2e-5, TOLERANCE[HALF], 2e-5]
    assert all(error(a, b) < limit for a, b, limit in zip(*results, limits, strict=True))


def test_no_rows(device):
    from megatron_taipan.ops.rms_norm_triton import add_rms_norm

    h, weight = torch.randn(2, 0, 16, device=device, requires_grad=True), torch.ones(16, device=device).requires_grad_()
    branch = torch.randn(2, 0, 16, device=device).to(HALF).requires_grad_()
    u, total = add_rms_norm(h, branch, weight, EPS)
    grads = torch.autograd.grad(u.sum() + total.sum(), (h, branch, weight))
    assert [g.shape for g in grads] == [h.shape, h.shape, weight.shape] and not grads[2].any()


def test_the_backward_pass_keeps_the_sum_and_one_number_a_row(device):
    """The branch is not kept, nor the stream before it."""
    from megatron_taipan.ops.rms_norm_triton import add_rms_norm

    h, branch = torch.randn(5, 64, device=device).requires_grad_(), torch.randn(5, 64, device=device).to(HALF)
    weight, kept = torch.ones(64, device=device, dtype=HALF).requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        _, total = add_rms_norm(h, branch.requires_grad_(), weight, EPS)
    assert {(t.data_ptr(), t.numel()) for t in kept if t.dim() > 1} == {(total.data_ptr(), 5 * 64)}
    assert sorted(t.numel() for t in kept) == [5, 64, 5 * 64]
