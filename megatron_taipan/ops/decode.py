"""The operations of one decoded token per row: plain torch, no reads by the host, so a CUDA graph can record them."""

import torch
from torch import Tensor

from megatron_taipan.ops.numerics import at_least_float32
from megatron_taipan.ops.ssd import ssd_step


def decode_attention_reference(q: Tensor, keys: Tensor, values: Tensor, lo: Tensor, hi: Tensor, longest: int) -> Tensor:
    """softmax(q k^T / sqrt(d)) v of one query per row over the slots lo <= j <= hi of that row's own buffer.

    Args:
        q: [b, hq, d]; keys, values: [b, s, hk, d], hk divides hq (consecutive query heads share a key head).
        lo, hi: [b] slots; a row with lo > hi sees nothing and returns zeros.
        longest: the largest number of slots that a row sees; the reference does not need it.

    Returns:
        [b, hq, d] in q's dtype.
    """
    b, hq, d = q.shape
    slots, hk = keys.shape[1:3]
    slot = torch.arange(slots, device=q.device)
    visible = (slot >= lo[:, None]) & (slot <= hi[:, None])  # [b, s]
    queries = at_least_float32(q).view(b, hk, hq // hk, d)
    scores = torch.einsum("bhgd,bshd->bhgs", queries, at_least_float32(keys)) * d**-0.5
    scores = scores.masked_fill(~visible[:, None, None], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1) * visible.any(-1)[:, None, None, None]
    return torch.einsum("bhgs,bshd->bhgd", weights, at_least_float32(values)).reshape(b, hq, d).to(q.dtype)


def ssd_update_reference(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None
) -> Tensor:
    """`ssd_step` with the state [b, h, p, n] overwritten by the new one; returns y [b, h, p]."""
    y, new = ssd_step(state, x, dt, A, B, C, D)
    state.copy_(new)
    return y
