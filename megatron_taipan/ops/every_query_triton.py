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
    def forward(ctx, u, q_proj, k_proj, v_proj, out_proj, lo, hi, index, count, head_dim):
        q, k, v = (F.linear(u, weight).unflatten(1, (-1, head_dim)) for weight in (q_proj, k_proj, v_proj))
        a, lse = attention_forward(q, k, v, lo, hi)  # [n, hq, head_dim], [hq, n]
        ctx.save_for_backward(u, q_proj, k_proj, v_proj, out_proj, lo, hi, index, count, q, k, v, a, lse)
        return F.linear(a.flatten(1), out_proj)

    @staticmethod
    def backward(ctx, do):
        u, q_proj, k_proj, v_proj, out_proj, lo, hi, index, count, q, k, v, a, lse = ctx.saved_tensors
        rows, wanted = Rows(index, count), ctx.needs_input_grad

        def picked(x: Tensor) -> Tensor:
            """The picked rows of [n, ...] in front of a buffer of as many."""
            x = x.flatten(1)
            buffer = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            return copy_rows(x if x.stride(1) == 1 else x.contiguous(), buffer, rows, scatter=False)

        do, picked_a, picked_q = picked(do), picked(a), picked(q)
        da = rows_product(do, out_proj, rows, torch.empty_like(picked_a), transposed=True, gather=False, scatter=False)
        dq, dk, dv = attention_backward(
            da.view(a.shape), picked_q.view(q.shape), k, v, picked_a.view(a.shape), lse[:, index],
            *rows.intervals(lo, hi),
        )  # fmt: skip
        dq, dk, dv = (t.flatten(1) for t in (dq, dk, dv))
        du = None
        if wanted[0]:  # added up in place: three tensors of u's size, and their sums, are not made
            du = (dk @ k_proj).addmm_(dv, v_proj)
            rows_product(dq, q_proj, rows, du, transposed=True, gather=False, scatter=True, add=True)
        dq_proj = weight_gradient(dq, u, rows, q_proj, gather=True) if wanted[1] else None
        dk_proj, dv_proj = (t.t() @ u if wants else None for t, wants in ((dk, wanted[2]), (dv, wanted[3])))
        dout_proj = weight_gradient(do, picked_a, rows, out_proj, gather=False) if wanted[4] else None
        return du, dq_proj, dk_proj, dv_proj, dout_proj, None, None, None, None, None


def every_query(
    u: Tensor, q_proj: Tensor, k_proj: Tensor, v_proj: Tensor, out_proj: Tensor, lo: Tensor, hi: Tensor, learned: Rows,
    head_dim: int,
) -> Tensor:  # fmt: skip
    """Attention(u q_proj^T, u k_proj^T, u v_proj^T) out_proj^T of every token, with gradients from the `learned` alone.

    Args:
        u: [n, d]; q_proj: [hq head_dim, d]; k_proj, v_proj: [hk head_dim, d]; out_proj: [d, hq head_dim].
        lo, hi: [n] int32, the keys that each token sees, as for `interval_attention`.
        learned: rows of n, with their number on the device. What arrives at the others passes no gradient on, as if it
            were 0.

    Returns:
        [n, d].
    """
    u = u if u.stride(1) == 1 else u.contiguous()
    lo, hi = lo.int().contiguous(), hi.int().contiguous()
    return _EveryQuery.apply(u, q_proj, k_proj, v_proj, out_proj, lo, hi, *learned, head_dim)
