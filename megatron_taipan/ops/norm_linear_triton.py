"""What begins with a norm of the residual stream, together with the products that read it: less is kept for the backward
pass, and no bit of a result is another.

A product's gradient needs its input once more. The input of the first products here is the norm's output, that of the
last one SwiGLU's product. Neither is kept: the backward kernel that comes before such a gradient has everything at hand
from which it was made, and writes it once more.
"""

import torch
import torch.nn.functional as F

from megatron_taipan.ops.rms_norm_triton import gradients_of_both, norm_backward, sum_and_norm
from megatron_taipan.ops.swiglu_triton import swiglu_backward, swiglu_forward
from megatron_taipan.ops.weight_gradient import weight_gradient


class _AddNormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, branch, norm_weight, weight, eps, kept):
        u, total, needed = sum_and_norm(h, branch, norm_weight, eps, kept)
        ctx.save_for_backward(*needed, weight)
        ctx.branch_dtype = branch.dtype if branch is not None else None
        return F.linear(u, weight), total

    @staticmethod
    def backward(ctx, dproduct, dtotal):
        *needed, weight = ctx.saved_tensors
        rows = dproduct.reshape(-1, dproduct.shape[-1])
        *gradients, u = _norm_gradients(ctx, rows @ weight, dtotal, needed, ctx.needs_input_grad[3])
        return *gradients, weight_gradient(rows, u) if u is not None else None, None, None


class _AddNormSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, branch, norm_weight, gate_weight, up_weight, down_weight, eps, kept):
        u, total, needed = sum_and_norm(h, branch, norm_weight, eps, kept)
        gate, up = F.linear(u, gate_weight), F.linear(u, up_weight)
        ctx.save_for_backward(*needed, gate, up, gate_weight, up_weight, down_weight)
        ctx.branch_dtype = branch.dtype if branch is not None else None
        return F.linear(swiglu_forward(gate, up), down_weight), total

    @staticmethod
    def backward(ctx, dout, dtotal):
        *needed, gate, up, gate_weight, up_weight, down_weight = ctx.saved_tensors
        needs_gate, needs_up, needs_down = ctx.needs_input_grad[3:6]
        rows = dout.reshape(-1, dout.shape[-1])
        width = gate.shape[-1]
        dgate, dup, gated = swiglu_backward((rows @ down_weight).view(gate.shape), gate, up, needs_down)
        ddown = rows.t() @ gated.view(-1, width) if needs_down else None
        del gated
        dgate, dup = dgate.view(-1, width), dup.view(-1, width)
        du = (dgate @ gate_weight).add_(dup @ up_weight)  # each rounded before they are added, as autograd does
        *gradients, u = _norm_gradients(ctx, du, dtotal, needed, needs_gate or needs_up)
        dweights = (dgate.t() @ u if needs_gate else None), (dup.t() @ u if needs_up else None)
        return *gradients, *dweights, ddown, None, None


def _norm_gradients(ctx, du, dtotal, needed, again):
    """Gradients of h, branch and norm_weight from du [n, d], and where it is needed again the norm's output [n, d]."""
    x, *others = needed
    second = ctx.branch_dtype if ctx.branch_dtype != x.dtype else None
    dh, dnorm, dbranch, u = norm_backward(du.view(x.shape), x, *others, dtotal, second, again)
    return *gradients_of_both(dh, dbranch, ctx.branch_dtype), dnorm, u.view(du.shape) if again else None


def add_norm_linear(
    h: torch.Tensor, branch: torch.Tensor | None, norm_weight: torch.Tensor, weight: torch.Tensor, eps: float,
    kept: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(F.linear(u, weight), h + branch) of (u, h + branch) = add_rms_norm(h, branch, norm_weight, eps, kept).

    Args:
        weight: [e, d].
    """
    return _AddNormLinear.apply(h, branch, norm_weight, weight, eps, kept)


def add_norm_swiglu(
    h: torch.Tensor, branch: torch.Tensor | None, norm_weight: torch.Tensor, gate_weight: torch.Tensor,
    up_weight: torch.Tensor, down_weight: torch.Tensor, eps: float, kept: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """(down(silu(gate(u)) * up(u)), h + branch) of (u, h + branch) = add_rms_norm(h, branch, norm_weight, eps, kept).

    Args:
        gate_weight, up_weight: [d_ff, d]; down_weight: [d, d_ff].
    """
    return _AddNormSwiglu.apply(h, branch, norm_weight, gate_weight, up_weight, down_weight, eps, kept)
