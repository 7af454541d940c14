"""Attention of every token, of which only the picked ones learn: all queries in one call forward, few in the backward pass.

The output of a token that a gate did not pick is needed for the gate's gradient alone, which is its product with the
gradient that arrives there. No gradient passes through it, so the backward pass takes the picked rows out and is as
long as if the others had never been computed. Forward, every product is a plain one and queries lie side by side.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_taipan.ops.interval_attention_triton import attention_backward, attention_forward
from megatron_taipan.ops.selected_rows import Rows
from megatron_taipan.ops.selected_rows_triton import copy_rows, rows_product, weight_gradient


class _EveryQuery(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, k, v, q_proj, out_proj, lo, hi, index, count):
        head_dim = k.shape[2]
        q = F.linear(u, q_proj).unflatten(1, (-1, head_dim))  # [n, hq, head_dim]
        a, lse = attention_forward(q, k, v, lo, hi)
        ctx.save_for_backward(u, k, v, q_proj, out_proj, lo, hi, index, count, q, a, lse)
        return F.linear(a.flatten(1), out_proj)

    @staticmethod
    def backward(ctx, do):
        u, k, v, q_proj, out_proj, lo, hi, index, count, q, a, lse = ctx.saved_tensors
        rows = Rows(index, count)

        def picked(x: Tensor) -> Tensor:
            """The picked rows of [n, ...] in front of a buffer of as many."""
            x = x.flatten(1)
            return copy_rows(x if x.stride(1) == 1 else x.contiguous(), torch.empty_like(x), rows, scatter=False)

        do, picked_a, picked_q = picked(do), picked(a), picked(q)
        da = rows_product(do, out_proj, rows, torch.empty_like(picked_a), transposed=True, gather=False, scatter=False)
        dq, dk, dv = attention_backward(
            da.view(a.shape),
            picked_q.view(q.shape),
            k,
            v,
            picked_a.view(a.shape),
            lse[:, index],
            *rows.intervals(lo, hi),
        )
        dq = dq.flatten(1)
        du = dq_proj = dout_proj = None
        if ctx.needs_input_grad[0]:
            du = rows_product(dq, q_proj, rows, torch.zeros_like(u), transposed=True, gather=False, scatter=True)
        if ctx.needs_input_grad[3]:
            dq_proj = weight_gradient(dq, u, rows, q_proj, gather=True)
        if ctx.needs_input_grad[4]:
            dout_proj = weight_gradient(do, picked_a, rows, out_proj, gather=False)
        return du, dk, dv, dq_proj, dout_proj, None, None, None, None


def every_query(
    u: Tensor, k: Tensor, v: Tensor, q_proj: Tensor, out_proj: Tensor, lo: Tensor, hi: Tensor, learned: Rows
) -> Tensor:
    """Attention(u q_proj^T, k, v) out_proj^T of every token, with gradients from the `learned` tokens alone.

    Args:
        u: [n, d]; k, v: [nk, hk, head_dim]; q_proj: [e, d]; out_proj: [d, e], e = hq head_dim.
        lo, hi: [n] int32, the keys that each token sees, as for `interval_attention`.
        learned: rows of n, with their number on the device; what arrives at the others passes no gradient on.

    Returns:
        [n, d].
    """
    u = u if u.stride(1) == 1 else u.contiguous()
    return _EveryQuery.apply(u, k, v, q_proj, out_proj, lo.int().contiguous(), hi.int().contiguous(), *learned)
