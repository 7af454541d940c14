"""Attention in which each query sees one interval of the keys: the one operation behind every attention layer.

Causality, windows, documents and batch rows are all intervals of a flattened token axis, and so are the queries
that a selective attention layer gathers: query i sees keys lo[i] .. hi[i].
"""

import torch
from torch import Tensor

from megatron_taipan.ops.numerics import at_least_float32

BLOCK = 128  # queries computed together: bounds the score matrix to BLOCK x (BLOCK + window)
TILE = 1024  # keys whose gradients a block's backward pass fills, however many there are in all


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
    if not nq:  # q, k and v stay in the graph: every rank must have gradients of the same parameters
        return q + 0 * (k.sum() + v.sum())
    lows, highs = lo.tolist(), hi.tolist()
    starts = [0]
    for i in range(1, nq):
        # A block ends early where the next query shares no key with the one before (another row or document).
        if i == starts[-1] + BLOCK or lows[i] > highs[i - 1]:
            starts.append(i)
    spans = list(zip(starts, [*starts[1:], nq], strict=True))
    # Split at once: the backward pass of a slice for each block would fill zeros as large as all queries, or all keys.
    queries = q.split([end - start for start, end in spans])
    tiles = k.split(TILE), v.split(TILE)
    blocks = []
    for mine, (start, end) in zip(queries, spans, strict=True):
        # Rows without keys may have any lo and hi: the block's keys follow from its first and last row that has some.
        seeing = [i for i in range(start, end) if lows[i] <= highs[i]]
        first, last = (lows[seeing[0]], highs[seeing[-1]]) if seeing else (0, -1)
        keys, values = (_rows(of, first, last) for of in tiles)
        blocks.append(_block(mine, keys, values, lo[start:end], hi[start:end], first))
    return torch.cat(blocks)


def _rows(tiles: tuple[Tensor, ...], first: int, last: int) -> Tensor:
    """Rows first..last of what was split into tiles of TILE rows."""
    touched = tiles[first // TILE : last // TILE + 1] or tiles[:1]
    rows = touched[0] if len(touched) == 1 else torch.cat(touched)
    return rows[first % TILE :][: last + 1 - first]


def _block(q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, first: int) -> Tensor:
    """One block of queries [m, hq, d] over the keys [s, hk, d] that any of them sees, the first of which is `first`."""
    m, hq, d = q.shape
    hk = k.shape[1]
    keys, values = at_least_float32(k), at_least_float32(v)
    position = torch.arange(first, first + len(k), device=q.device)
    visible = (position >= lo[:, None]) & (position <= hi[:, None])  # [m, s]
    queries = at_least_float32(q).view(m, hk, hq // hk, d)
    scores = torch.einsum("mhgd,shd->hgms", queries, keys) * d**-0.5
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1) * visible.any(-1, keepdim=True)  # a row without keys gives zeros, not their mean
    return torch.einsum("hgms,shd->mhgd", weights, values).reshape(m, hq, d).to(q.dtype)
