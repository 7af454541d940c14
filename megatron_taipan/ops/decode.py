"""The operations of one decoded token per row: plain torch, no reads by the host, so a CUDA graph can record them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_taipan.ops.causal_conv1d import causal_conv1d_reference
from megatron_taipan.ops.numerics import at_least_float32
from megatron_taipan.ops.ssd import ssd_step


def decode_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, first: Tensor, position: Tensor, start: Tensor,
    window: int | None = None, chosen: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(q k^T / sqrt(d)) v of one more token per row, whose k and v are written into the row's buffers first.

    Args:
        q: [b, hq, d]; k, v: [b, hk, d] of the same token, hk divides hq (consecutive query heads share a key head).
        keys, values: [b, s, hk, d]; slot j holds the token at position first + j.
        first: []; position: [1] of the token; start: [b] the first position of its document; integers.
        window: tokens that a query sees, itself included; None: all.
        chosen: bool [b], rows that attend; the others return zeros. None: all.

    Returns:
        [b, hq, d] in q's dtype.
    """
    b, hq, d = q.shape
    slots, hk = keys.shape[1:3]
    keys.index_copy_(1, position - first, k[:, None].to(keys.dtype))  # autocast's may differ
    values.index_copy_(1, position - first, v[:, None].to(values.dtype))
    at = torch.arange(slots, device=q.device) + first
    low = start if window is None else torch.maximum(start, position - window + 1)
    visible = (at >= low[:, None]) & (at <= position)  # [b, s]
    visible = visible if chosen is None else visible & chosen[:, None]
    queries = at_least_float32(q).view(b, hk, hq // hk, d)
    scores = torch.einsum("bhgd,bshd->bhgs", queries, at_least_float32(keys)) * d**-0.5
    scores = scores.masked_fill(~visible[:, None, None], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1) * visible.any(-1)[:, None, None, None]
    return torch.einsum("bhgs,bshd->bhgd", weights, at_least_float32(values)).reshape(b, hq, d).to(q.dtype)


def conv_update_reference(tail: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`causal_conv1d_reference` of x [b, c], the tail [b, w-1, c] overwritten by the next one; returns y [b, c]."""
    y, new = causal_conv1d_reference(x[:, None], weight, bias, initial_tail=tail, return_tail=True)
    tail.copy_(new)
    return y[:, 0]


def ssd_update_reference(
    state: Tensor, x: Tensor, dt: Tensor, dt_bias: Tensor, A_log: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None
) -> Tensor:
    """`ssd_step` with softplus(dt + dt_bias) and A = -exp(A_log), dt [b, h] as projected, dt_bias and A_log [h]; the
    state [b, h, p, n] is overwritten by the new one. Returns y [b, h, p]."""
    steps = F.softplus(at_least_float32(dt) + dt_bias)
    y, new = ssd_step(state, x, steps, -at_least_float32(A_log).exp(), B, C, D)
    state.copy_(new)
    return y
