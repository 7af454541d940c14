"""The Triton kernels of interval attention against a dense softmax in float64."""

import pytest
import torch

from tests.ops.kernel_checks import TOLERANCE, assert_close, poison

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")


def dense(q, k, v, lo, hi):
    """softmax over an explicit mask; rows without keys give zeros."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    at = torch.arange(k.shape[0], device=q.device)
    visible = (at >= lo[:, None]) & (at <= hi[:, None])
    weights = scores.masked_fill(~visible, -1e30).softmax(-1) * visible.any(-1, keepdim=True)
    return torch.einsum("hqk,khd->qhd", weights, v)


def intervals(n_keys: int, density: float, window: int, documents: int, padding: int):
    """lo, hi of the selected tokens of packed documents, then padding rows without keys."""
    hi = (torch.rand(n_keys, device="cuda") < density).nonzero()[:, 0]
    starts = torch.cat(
        [torch.zeros(1, dtype=torch.long), torch.randperm(n_keys - 1)[: documents - 1].sort()[0] + 1]
    ).cuda()
    lo = torch.maximum(starts[torch.bucketize(hi, starts, right=True) - 1], hi - window + 1)
    lo = torch.cat([lo, torch.full((padding,), n_keys, device="cuda")])
    hi = torch.cat([hi, torch.full((padding,), n_keys - 1, device="cuda")])
    return lo.int(), hi.int()


@pytest.mark.parametrize(
    "dtype, d, heads, kv_heads, n_keys, density, window, documents, padding",
    [
        (torch.bfloat16, 128, 4, 2, 1031, 0.3, 200, 3, 77),
        (torch.bfloat16, 64, 2, 2, 777, 1.0, 64, 4, 0),  # every token selected
        (torch.float16, 128, 2, 1, 700, 0.1, 2048, 1, 5),  # the window covers all
        (torch.float32, 64, 2, 1, 333, 0.5, 3, 2, 3),  # a window narrower than any block
    ],
)
def test_output_and_gradients(dtype, d, heads, kv_heads, n_keys, density, window, documents, padding):
    from megatron_taipan.ops.interval_attention_triton import interval_attention

    lo, hi = intervals(n_keys, density, window, documents, padding)
    q = torch.randn(len(lo), heads, d, device="cuda", dtype=dtype)
    k, v = (torch.randn(n_keys, kv_heads, d, device="cuda", dtype=dtype) for _ in range(2))
    assert_close(
        lambda q, k, v: interval_attention(q, k, v, lo, hi), lambda q, k, v: dense(q, k, v, lo, hi), [q, k, v],
        TOLERANCE[dtype],
    )  # fmt: skip


def test_nothing_selected_gives_zeros_and_zero_gradients():
    from megatron_taipan.ops.interval_attention_triton import interval_attention

    lo, hi = torch.full((130,), 500, device="cuda").int(), torch.full((130,), 499, device="cuda").int()
    q = torch.randn(130, 2, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(500, 2, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    poison()
    out = interval_attention(q, k, v, lo, hi)
    grads = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert all((t == 0).all() for t in (out, *grads))


def test_the_same_inputs_give_the_same_bits():
    from megatron_taipan.ops.interval_attention_triton import interval_attention

    lo, hi = intervals(3000, 0.2, 500, 2, 10)
    q = torch.randn(len(lo), 4, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(3000, 4, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    grad = torch.randn_like(q)
    runs = [torch.autograd.grad(interval_attention(q, k, v, lo, hi), (q, k, v), grad) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
