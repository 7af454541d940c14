"""Attention in which each query sees one interval of the keys: the one operation behind every attention layer.

Causality, windows, documents and batch rows are all intervals of a flattened token axis, and so are the queries
that a selective attention layer gathers: query i sees keys lo[i] .. hi[i].
"""

import torch
from torch import Tensor

from megatron_taipan.ops.numerics import at_least_float32

BLOCK = 128  # queries computed together: bounds the score matrix to BLOCK x (BLOCK + window)


def interval_attention_reference(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the keys lo[i] <= j <= hi[i], in plain torch.

    Args:
        q: [nq, hq, d]; k, v: [nk, hk, d], hk divides hq (consecutive query heads share a key head).
        lo, hi: [nq] integers, both non-decreasing among rows with lo <= hi. A row with lo > hi sees no key and returns
            zeros (padding of a buffer of fixed capacity).

    Returns:
        [nq, hq, d] in q's dtype.
    """
    nq, hq, d = q.shape
    hk = k.shape[1]
    if hq % hk:
        raise ValueError(f"interval_attention: {hk} key heads do not divide {hq} query heads")
    lows, highs = lo.tolist(), hi.tolist()
    blocks = []
    start = 0
    while start < nq:
        end = start + 1
        # A block ends early where the next query shares no key with the one before (another row or document).
        while end < nq and end - start < BLOCK and lows[end] <= highs[end - 1]:
            end += 1
        # Rows without keys may have any lo and hi: the block's keys follow from its first and last row that has some.
        seeing = [i for i in range(start, end) if lows[i] <= highs[i]]
        first, last = (lows[seeing[0]], highs[seeing[-1]]) if seeing else (0, -1)
        blocks.append(_block(q[start:end], k, v, lo[start:end], hi[start:end], first, last))
        start = end
    # Without queries q, k and v stay in the graph: every rank must have gradients of the same parameters.
    return torch.cat(blocks) if blocks else q + 0 * (k.sum() + v.sum())


def _block(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, first: int, last: int) -> Tensor:
    """One block of queries [m, hq, d] over the keys first..last that any of them sees."""
    m, hq, d = q.shape
    hk = k.shape[1]
    keys = at_least_float32(k[first : last + 1])  # [s, hk, d]
    values = at_least_float32(v[first : last + 1])
    position = torch.arange(first, last + 1, device=q.device)
    visible = (position >= lo[:, None]) & (position <= hi[:, None])  # [m, s]
    queries = at_least_float32(q).view(m, hk, hq // hk, d)
    scores = torch.einsum("mhgd,shd->hgms", queries, keys) * d**-0.5
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1) * visible.any(-1, keepdim=True)  # a row without keys gives zeros, not their mean
    return torch.einsum("hgms,shd->mhgd", weights, values).reshape(m, hq, d).to(q.dtype)
