"""Checks of the interval attention kernels on any device: a GPU, or a CPU under Triton's interpreter.

`TRITON_INTERPRET=1 python -m tests.ops.interval_attention_cases` runs a few small ones without a GPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.ops.kernel_checks import TOLERANCE, error, with_gradients


@dataclass(frozen=True)
class Case:
    """Packed documents of n_keys tokens, a share of them selected, then rows of padding at the end of the buffer."""

    n_keys: int
    density: float
    window: int
    documents: int = 1
    padding: int = 0
    heads: int = 2
    kv_heads: int = 2
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    def intervals(self, device: str) -> tuple[Tensor, Tensor]:
        """lo, hi [selected + padding] int32. The padding holds any numbers with lo > hi."""
        hi = (torch.rand(self.n_keys) < self.density).nonzero()[:, 0]
        later = torch.randperm(self.n_keys - 1)[: self.documents - 1] + 1
        starts = torch.cat([torch.zeros(1, dtype=torch.long), later.sort().values])
        lo = torch.maximum(starts[torch.bucketize(hi, starts, right=True) - 1], hi - self.window + 1)
        empty = torch.randint(0, self.n_keys, (self.padding,))
        lo, hi = torch.cat([lo, empty + 1]), torch.cat([hi, empty - torch.randint(0, 2, (self.padding,))])
        return lo.int().to(device), hi.int().to(device)

    def tensors(self, n_queries: int, device: str) -> list[Tensor]:
        """Random q, k, v."""
        shapes = (n_queries, self.heads), (self.n_keys, self.kv_heads), (self.n_keys, self.kv_heads)
        return [torch.randn(*shape, self.head_dim).to(device, self.dtype) for shape in shapes]


def dense(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """softmax over an explicit mask; rows without keys give zeros."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    at = torch.arange(k.shape[0], device=q.device)
    visible = (at >= lo[:, None]) & (at <= hi[:, None])
    weights = scores.masked_fill(~visible, -1e30).softmax(-1) * visible.any(-1, keepdim=True)
    return torch.einsum("hqk,khd->qhd", weights, v)


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty and its kin hand out NaN: an element that no kernel wrote shows."""
    kinds = {name: getattr(torch, name) for name in ("empty", "empty_like")}

    def filled(make):
        def run(*args, **kwargs):
            made = make(*args, **kwargs)
            return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(2**30)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name, make in kinds.items():
            patch.setattr(torch, name, filled(make))
        yield


def check(case: Case, device: str) -> None:
    """Output and gradients against float64; rows of padding give zeros to the bit, and may hold NaN past the 64th."""
    from megatron_taipan.ops.interval_attention_triton import interval_attention

    lo, hi = case.intervals(device)
    inputs = case.tensors(len(lo), device)
    padding = lo > hi
    expected = with_gradients(lambda *qkv: dense(*qkv, lo, hi), [t.double() for t in inputs])
    unread = padding & (torch.arange(len(lo), device=device) >= (~padding).sum() + 64)

    def kernels(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = interval_attention(q, k, v, lo, hi)
        o.register_hook(lambda grad: grad.masked_fill(unread[:, None, None], float("nan")))
        return o.clone()

    with poisoned():
        got = with_gradients(kernels, [inputs[0].masked_fill(unread[:, None, None], float("nan")), *inputs[1:]])
    errors = [error(a, b) for a, b in zip(got, expected, strict=True)]
    assert all(e < TOLERANCE[case.dtype] for e in errors), (case, errors)
    assert (got[0][padding] == 0).all() and (got[1][padding] == 0).all()


def check_same_bits(case: Case, device: str) -> None:
    """Two runs of the deterministic kernels agree in every bit."""
    from megatron_taipan.ops.interval_attention_triton import interval_attention

    lo, hi = case.intervals(device)
    inputs = case.tensors(len(lo), device)
    runs = [with_gradients(lambda *qkv: interval_attention(*qkv, lo, hi), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def check_ranges(case: Case, device: str) -> None:
    """The queries that touch each block of keys, against a search through all of them."""
    from megatron_taipan.ops.interval_attention_kernels import ranges_kernel

    lo, hi = case.intervals(device)
    blocks = -(-case.n_keys // 16)
    ranges = torch.full((2, blocks), 2**30, dtype=torch.int32, device=device)
    ranges_kernel[(-(-blocks // 32),)](
        lo, hi, ranges, len(lo), case.n_keys, blocks, len(lo).bit_length(), BLOCK_K=16, BLOCK=32
    )
    for block, (first, last) in enumerate(ranges.t().tolist()):
        touching = ((lo <= hi) & (hi >= 16 * block) & (lo < 16 * (block + 1))).nonzero()[:, 0].tolist()
        assert list(range(first, last)) == touching, (case, block)


SMALL = [  # what the interpreter does in seconds
    Case(301, 0.4, 90, documents=3, padding=150, heads=2, kv_heads=1, head_dim=64, dtype=torch.float32),
    Case(1300, 0.3, 300, heads=1, kv_heads=1, head_dim=16, dtype=torch.float16),  # keys taken in a circle
    Case(150, 1.0, 20, documents=2, heads=1, kv_heads=1, head_dim=32, dtype=torch.float16),
    Case(97, 0.5, 2, heads=1, kv_heads=1, head_dim=16, dtype=torch.float32),  # itself and the token before
    Case(70, 0.0, 9, padding=130, heads=1, kv_heads=1, head_dim=16, dtype=torch.float16),  # nothing selected
    Case(70, 0.0, 9, heads=1, kv_heads=1, head_dim=16, dtype=torch.float16),  # not even a row
]

if __name__ == "__main__":
    torch.manual_seed(0)
    for small in SMALL:
        check(small, "cpu")
        print("passed", small)
        check_ranges(small, "cpu") if small.density else None
    check_same_bits(SMALL[0], "cpu")
