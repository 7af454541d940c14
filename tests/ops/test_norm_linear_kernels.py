"""A norm together with the products after it gives what they give one by one, bit for bit.

On a GPU, or interpreted with TRITON_INTERPRET=1.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.ops.devices import DEVICES
from tests.ops.kernel_checks import poison

pytest.importorskip("triton")
EPS = 1e-5


@pytest.fixture(params=DEVICES)
def make(request) -> Callable[..., Tensor]:
    """Random leaves, of the type in which layers compute unless said otherwise."""
    if request.param == "cuda":
        poison()
    torch.manual_seed(0)
    compute = torch.bfloat16 if request.param == "cuda" else torch.float32  # the interpreter cuts bf16 off

    def leaf(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(*shape, device=request.param).to(dtype or compute).requires_grad_()

    return leaf


def assert_same_bits(one: Callable, other: Callable, leaves: list[Tensor | None]) -> None:
    """Results (u, sum), and gradients of everything that is given."""
    given = [t for t in leaves if t is not None]
    results = []
    for run in (one, other):
        u, total = run(*leaves)
        torch.manual_seed(1)
        upstream = [torch.randn_like(t) for t in (u, total)]
        results.append([u, total, *torch.autograd.grad((u, total), given, upstream)])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


@pytest.mark.parametrize("has_branch", [True, False])
def test_norm_and_product(make, has_branch):
    from megatron_taipan.ops.norm_linear_triton import add_norm_linear
    from megatron_taipan.ops.rms_norm_triton import add_rms_norm

    def one_by_one(h, branch, norm_weight, weight):
        u, total = add_rms_norm(h, branch, norm_weight, EPS)
        return F.linear(u, weight), total

    leaves = [make(3, 21, 96, dtype=torch.float32), make(3, 21, 96) if has_branch else None, make(96), make(40, 96)]
    assert_same_bits(one_by_one, lambda *t: add_norm_linear(*t, EPS), leaves)


def test_norm_and_swiglu(make):
    from megatron_taipan.ops.norm_linear_triton import add_norm_swiglu
    from megatron_taipan.ops.rms_norm_triton import add_rms_norm
    from megatron_taipan.ops.swiglu_triton import silu_mul

    def one_by_one(h, branch, norm_weight, gate, up, down):
        u, total = add_rms_norm(h, branch, norm_weight, EPS)
        return F.linear(silu_mul(F.linear(u, gate), F.linear(u, up)), down), total

    leaves = [make(2, 21, 96, dtype=torch.float32), make(2, 21, 96), make(96), make(80, 96), make(80, 96), make(96, 80)]
    assert_same_bits(one_by_one, lambda *t: add_norm_swiglu(*t, EPS), leaves)


@pytest.mark.parametrize("frozen", ["weight", "stream"])
def test_what_needs_no_gradient_gets_none(make, frozen):
    """As a tuned model's frozen matrices; and the stream that leaves frozen layers."""
    from megatron_taipan.ops.norm_linear_triton import add_norm_linear

    h, norm_weight, weight = make(5, 32, dtype=torch.float32), make(32), make(8, 32)
    (weight if frozen == "weight" else h).requires_grad_(False)
    out, _ = add_norm_linear(h, None, norm_weight, weight, EPS)
    out.sum().backward()
    assert (weight.grad is None) == (frozen == "weight") and (h.grad is None) == (frozen == "stream")


def test_a_sum_that_is_added_again_is_the_same(make):
    """Of a stream in float32 and a branch in 16 bits; what is kept of the sum is the narrower summand."""
    from megatron_taipan.ops.rms_norm_triton import add_rms_norm

    leaves = [make(3, 7, 64, dtype=torch.float32), make(3, 7, 64, dtype=torch.bfloat16), make(64)]
    assert_same_bits(lambda *t: add_rms_norm(*t, EPS), lambda *t: add_rms_norm(*t, EPS, True), leaves)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        add_rms_norm(*leaves, EPS, True)
    assert {t.data_ptr() for t in kept if t.dim() > 1} == {t.data_ptr() for t in leaves[:2]}
