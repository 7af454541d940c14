"""The norms against torch's, transformers' and the formula."""

import pytest
import torch
import torch.nn.functional as F

from megatron_taipan.ops.norms import add_rms_norm_reference, gated_rms_norm_reference, rms_norm_reference
from tests.model.oracles import in_float64


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def test_rms_norm_equals_torchs_with_gradients():
    x, weight = double(2, 5, 8).requires_grad_(), double(8).requires_grad_()
    ours, theirs = rms_norm_reference(x, weight, 1e-5), F.rms_norm(x, (8,), weight, 1e-5)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    upstream = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(y, (x, weight), upstream) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_epsilon_counts_beside_the_mean_square():
    x = torch.full((1, 4), 1e-3, dtype=torch.float64)
    expected = 1e-3 / (1e-6 + 1e-5) ** 0.5
    assert rms_norm_reference(x, torch.ones(4, dtype=torch.float64), 1e-5)[0, 0].item() == pytest.approx(expected)


def test_a_float32_stream_comes_out_in_the_weights_dtype_after_float32_statistics():
    x = torch.randn(3, 64) * 300
    weight = torch.ones(64, dtype=torch.bfloat16)
    out = rms_norm_reference(x, weight, 1e-5)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, F.rms_norm(x, (64,), eps=1e-5).bfloat16())
    # Squares of 300 do not fit in fp16; the statistics must not be taken there.
    assert rms_norm_reference(x.half(), weight.half(), 1e-5).isfinite().all()


@pytest.mark.parametrize("has_branch", [True, False])
def test_the_streams_sum_and_its_norm_equal_torchs_with_gradients(has_branch):
    h, weight = double(2, 5, 8).requires_grad_(), double(8).requires_grad_()
    branch = double(2, 5, 8).requires_grad_() if has_branch else None
    leaves = [t for t in (h, branch, weight) if t is not None]
    total = h + branch if has_branch else h
    expected = F.rms_norm(total, (8,), weight, 1e-5), total
    ours = add_rms_norm_reference(h, branch, weight, 1e-5)
    upstream = [torch.randn_like(t) for t in ours]
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-13)
    for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (ours, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_sum_stays_in_the_streams_type_and_its_gradient_is_rounded_for_the_branch_only():
    h, branch = torch.randn(3, 64).requires_grad_(), torch.randn(3, 64).bfloat16().requires_grad_()
    u, total = add_rms_norm_reference(h, branch, torch.ones(64, dtype=torch.bfloat16), 1e-5)
    assert u.dtype == torch.bfloat16 and torch.equal(total, h + branch.float())
    dh, dbranch = torch.autograd.grad(u.float().sin().sum() + total.cos().sum(), (h, branch))
    assert dh.dtype == torch.float32 and torch.equal(dbranch, dh.bfloat16())


@pytest.mark.parametrize("n_groups", [1, 2, 4])
def test_gated_norm_equals_transformers(monkeypatch, n_groups):
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    y, z, weight = (double(*s).requires_grad_() for s in ((2, 5, 8), (2, 5, 8), (8,)))
    oracle = modeling.MambaRMSNormGated(8, group_size=8 // n_groups, eps=1e-5).double()
    oracle.weight.data = weight.detach().clone()
    with in_float64(monkeypatch, modeling):
        theirs = oracle(y, z)
        upstream = torch.randn_like(theirs)
        expected = torch.autograd.grad(theirs, (y, z, oracle.weight), upstream)
    ours = gated_rms_norm_reference(y, z, weight, eps=1e-5, group_size=8 // n_groups)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)
    for a, b in zip(torch.autograd.grad(ours, (y, z, weight), upstream), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_norm_comes_after_the_gate_and_groups_are_consecutive_channels():
    y, z, weight = double(6), double(6), double(6)
    gated = y * z * torch.sigmoid(z)
    expected = torch.cat([part / (part.square().sum() / 3 + 1e-5).sqrt() for part in (gated[:3], gated[3:])]) * weight
    ours = gated_rms_norm_reference(y, z, weight, eps=1e-5, group_size=3)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-13)


def test_a_group_spread_over_ranks_adds_up_their_squares():
    """Two ranks of four channels each, one group of eight."""
    y, z, weight = double(3, 8), double(3, 8), double(8)
    whole = gated_rms_norm_reference(y, z, weight, eps=1e-5, group_size=8)
    squares = [(y[:, s] * F.silu(z[:, s])).square().sum(-1, keepdim=True)[..., None] for s in (slice(4), slice(4, 8))]
    for rank, part in enumerate((slice(4), slice(4, 8))):

        def reduce_sum(own, other=squares[1 - rank]):
            return own + other

        ours = gated_rms_norm_reference(
            y[:, part], z[:, part], weight[part], eps=1e-5, group_size=8, reduce_sum=reduce_sum
        )
        torch.testing.assert_close(ours, whole[:, part], rtol=0, atol=1e-13)
