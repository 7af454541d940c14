# ruff: noqa: E501  (kernel signatures and tuples of results are one line each)
"""RMSNorm in Triton: one pass over memory forward, one backward.

The backward kernel keeps the gradient of the weight in registers while a program walks over its rows, and writes one
partial sum a program.
"""

import torch
import triton
import triton.language as tl

from megatron_taipan.ops.rowwise import row_warps, rows_of

PROGRAMS = 528  # four a multiprocessor of an H100


@triton.jit
def _norm_forward_kernel(x_ptr, weight_ptr, y_ptr, scale_ptr, width, x_row, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    inside = offs < width
    x = tl.load(x_ptr + row * x_row + offs, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    weight = tl.load(weight_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + offs, (x * scale * weight).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _norm_backward_kernel(dy_ptr, x_ptr, weight_ptr, scale_ptr, residual_ptr, dx_ptr, sums_ptr, rows, width, x_row, dy_row,
                          residual_row, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """dx = residual + scale * (dy w - x scale^2 mean(dy w x)); sums [programs, width]: parts of the weight's gradient."""
    offs = tl.arange(0, BLOCK)
    inside = offs < width
    weight = tl.load(weight_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    mine = tl.program_id(0).to(tl.int64)
    for i in range(0, tl.cdiv(rows - tl.program_id(0), tl.num_programs(0))):
        row = mine + i * tl.num_programs(0)
        x = tl.load(x_ptr + row * x_row + offs, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_row + offs, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row)
        normed = x * scale
        dweight += dy * normed
        grad = dy * weight
        dx = scale * (grad - normed * (tl.sum(grad * normed, 0) / width))
        if HAS_RESIDUAL:
            dx += tl.load(residual_ptr + row * residual_row + offs, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * width + offs, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(sums_ptr + tl.program_id(0) * width + offs, dweight, mask=inside)


@torch.library.custom_op("megatron_taipan::rms_norm_forward", mutates_args=())
def _norm_forward_op(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    flat = rows_of(x)
    rows, d = flat.shape
    y = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(d)
    if rows:
        _norm_forward_kernel[(rows,)](
            flat, weight, y, scale, d, flat.stride(0), eps, BLOCK=block, num_warps=row_warps(block)
        )  # fmt: skip
    return y, scale


@_norm_forward_op.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape, dtype=weight.dtype), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@torch.library.custom_op("megatron_taipan::rms_norm_backward", mutates_args=())
def _norm_backward_op(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, residual: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    flat, dflat = rows_of(x), rows_of(dy)
    rows, d = flat.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    programs = max(1, min(rows, PROGRAMS))
    sums = torch.empty((programs, d), dtype=torch.float32, device=x.device)
    other = rows_of(residual) if residual is not None else dflat
    block = triton.next_power_of_2(d)
    _norm_backward_kernel[(programs,)](
        dflat, flat, weight, scale, other, dx, sums, rows, d, flat.stride(0), dflat.stride(0), other.stride(0),
        HAS_RESIDUAL=residual is not None, BLOCK=block, num_warps=row_warps(block),
    )  # fmt: skip
    return dx, sums.sum(0).to(weight.dtype)


@_norm_backward_op.register_fake
def _(dy, x, weight, scale, residual):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_norm(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _norm_backward(ctx, dy, _dscale):
    return *_norm_backward_op(dy, *ctx.saved_tensors, None), None


_norm_forward_op.register_autograd(_norm_backward, setup_context=_save_norm)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `rms_norm_reference`."""
    return _norm_forward_op(x, weight, eps)[0]


class _NormAndStream(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, weight, eps):
        u, scale = _norm_forward_op(h, weight, eps)
        ctx.save_for_backward(h, weight, scale)
        return u, h.view_as(h)

    @staticmethod
    def backward(ctx, du, dh):
        h, weight, scale = ctx.saved_tensors
        dx, dweight = _norm_backward_op(du, h, weight, scale, dh)
        return dx, dweight, None


def rms_norm_and_stream(h: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(RMSNorm(h), h): the normed input of a block, and the residual stream that goes around it.

    Taking the stream from here lets the backward pass add its gradient inside the norm's kernel, where autograd would
    read and write the whole stream once more.
    """
    return _NormAndStream.apply(h, weight, eps)
