"""Interval attention against torch's SDPA with the same visibility written out as a mask."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_taipan.ops import interval_attention
from megatron_taipan.ops.interval_attention import interval_attention_reference


def dense(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """SDPA over a mask [nq, nk]; queries that see no key give zeros."""
    at = torch.arange(k.shape[0])
    mask = (at >= lo[:, None]) & (at <= hi[:, None])
    some = mask.any(1)
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    q, k, v = (t.transpose(0, 1) for t in (q[some], k, v))
    out = torch.zeros(len(some), q.shape[0], q.shape[2], dtype=q.dtype)
    return out.index_put((some.nonzero()[:, 0],), F.scaled_dot_product_attention(q, k, v, mask[some]).transpose(0, 1))


def tensors(nq: int, nk: int, hq: int = 4, hk: int = 2, d: int = 4) -> list[Tensor]:
    made = torch.Generator().manual_seed(nq)
    shapes = (nq, hq, d), (nk, hk, d), (nk, hk, d)
    return [torch.randn(*s, generator=made, dtype=torch.float64, requires_grad=True) for s in shapes]


def assert_same(lo: list[int], hi: list[int], nk: int, **sizes: int) -> None:
    """Values and all gradients."""
    low, high = (torch.tensor(t, dtype=torch.int32) for t in (lo, hi))
    leaves = tensors(len(lo), nk, **sizes)
    ours, theirs = (attend(*leaves, low, high) for attend in (interval_attention_reference, dense))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    upstream = torch.randn(ours.shape, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@st.composite
def packed_rows(draw) -> tuple[list[int], list[int], int]:
    """Intervals of gathered queries: several rows, documents in each, causal, a window; some queries left out, and
    between them padding queries that see nothing, with any numbers lo > hi."""
    rows, length = draw(st.integers(1, 3)), draw(st.integers(1, 8))
    window = draw(st.integers(1, 9))
    kinds = st.lists(st.sampled_from("gathered skipped padding begins".split()), min_size=length, max_size=length)
    lo, hi = [], []
    for row in range(rows):
        start = 0
        for i, kind in enumerate(draw(kinds)):
            if kind == "padding":
                empty = draw(st.integers(0, rows * length - 1))
                lo, hi = [*lo, empty + 1], [*hi, draw(st.integers(-1, empty))]
            elif kind != "skipped":
                start = i if kind == "begins" else start
                lo, hi = [*lo, row * length + max(start, i - window + 1)], [*hi, row * length + i]
    return lo or [0], hi or [0], rows * length


@settings(max_examples=60)
@given(packed_rows(), st.integers(1, 5), st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]))
def test_any_rows_documents_windows_and_gathered_queries(case, block, heads):
    lo, hi, nk = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interval_attention, "BLOCK", block)  # several blocks, also at tiny sizes
        assert_same(lo, hi, nk, hq=heads[0], hk=heads[1])


def test_more_queries_than_a_block():
    n = 2 * interval_attention.BLOCK + 7
    assert_same([max(0, i - 9) for i in range(n)], list(range(n)), n, hq=2, hk=1)


def test_queries_without_keys_give_zeros_and_no_gradient():
    q, k, v = tensors(4, 6)
    out = interval_attention_reference(q, k, v, torch.tensor([0, 1, 6, 1]), torch.tensor([2, 0, 5, 0]))
    assert (out[[1, 2, 3]] == 0).all() and (out[0] != 0).all()
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert (dq[[1, 2, 3]] == 0).all() and (dk[3:] == 0).all() and (dv[3:] == 0).all()
    assert (dv[:3] != 0).any()


@pytest.mark.parametrize("nq", [0, 3])
def test_no_query_at_all_still_has_a_backward_pass(nq):
    """A layer may select nothing; its projections then get gradients of zero, not an error."""
    q, k, v = tensors(nq, 5)
    out = interval_attention_reference(q, k, v, torch.ones(nq, dtype=torch.int32), torch.zeros(nq, dtype=torch.int32))
    assert out.shape == (nq, 4, 4)
    for grad in torch.autograd.grad(out.sum(), (q, k, v)):
        assert (grad == 0).all()


def test_low_precision_comes_out_in_low_precision_from_a_float32_softmax():
    q, k, v = (t.detach().bfloat16() for t in tensors(20, 20))
    lo, hi = torch.zeros(20, dtype=torch.int32), torch.arange(20, dtype=torch.int32)
    out = interval_attention_reference(q, k, v, lo, hi)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), dense(q.double(), k.double(), v.double(), lo, hi), rtol=2**-8, atol=1e-5)


def test_heads_that_do_not_fit_are_refused():
    q, k, v = tensors(2, 2, hq=3, hk=2)
    with pytest.raises(ValueError, match="2 key heads do not divide 3"):
        interval_attention_reference(q, k, v, torch.tensor([0, 0]), torch.tensor([0, 1]))
