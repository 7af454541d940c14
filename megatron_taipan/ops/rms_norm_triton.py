"""RMSNorm in Triton, alone or with the residual stream's sum before it: one pass over memory forward, one backward.

The backward kernel keeps the gradient of the weight in registers while a program walks over its rows, and writes one
partial sum a program.
"""

import torch
import triton
import triton.language as tl

from megatron_taipan.ops.column_sums_triton import column_sums
from megatron_taipan.ops.norms import keeps_summands
from megatron_taipan.ops.rowwise import row_warps, rows_of

PROGRAMS = 528  # four a multiprocessor of an H100


@triton.jit
def _norm_forward_kernel(x_ptr, branch_ptr, weight_ptr, y_ptr, sum_ptr, scale_ptr, width, x_row, branch_row, eps,
                         HAS_BRANCH: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """y = x / rms(x) weight; HAS_BRANCH: of sum = x + branch, rounded to its type, in place of x."""
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    inside = offs < width
    x = tl.load(x_ptr + row * x_row + offs, mask=inside, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        x += tl.load(branch_ptr + row * branch_row + offs, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * width + offs, rounded, mask=inside)
        x = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / width + eps)
    weight = tl.load(weight_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + offs, (x * scale * weight).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _norm_backward_kernel(dy_ptr, x_ptr, branch_ptr, weight_ptr, scale_ptr, residual_ptr, dx_ptr, dbranch_ptr, y_ptr,
                          sums_ptr, rows, width, x_row, branch_row, dy_row, residual_row, HAS_BRANCH: tl.constexpr,
                          HAS_RESIDUAL: tl.constexpr, TWICE: tl.constexpr, AGAIN: tl.constexpr,
                          BLOCK: tl.constexpr):  # fmt: skip
    """dx = residual + scale * (dy w - x scale^2 mean(dy w x)); sums [programs, width]: parts of the weight's gradient.

    HAS_BRANCH: of x + branch, rounded to x's type, in place of x. TWICE: dx is also written to dbranch, in its type. AGAIN: the norm y is written once more, as the forward kernel
    computes it.
    """
    offs = tl.arange(0, BLOCK)
    inside = offs < width
    weight = tl.load(weight_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    mine = tl.program_id(0).to(tl.int64)
    for i in range(0, tl.cdiv(rows - tl.program_id(0), tl.num_programs(0))):
        row = mine + i * tl.num_programs(0)
        x = tl.load(x_ptr + row * x_row + offs, mask=inside, other=0.0).to(tl.float32)
        if HAS_BRANCH:
            x += tl.load(branch_ptr + row * branch_row + offs, mask=inside, other=0.0).to(tl.float32)
            x = x.to(x_ptr.dtype.element_ty).to(tl.float32)
        dy = tl.load(dy_ptr + row * dy_row + offs, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row)
        normed = x * scale
        dweight += dy * normed
        grad = dy * weight
        dx = scale * (grad - normed * (tl.sum(grad * normed, 0) / width))
        if HAS_RESIDUAL:
            dx += tl.load(residual_ptr + row * residual_row + offs, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + row * width + offs, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if TWICE:
            tl.store(dbranch_ptr + row * width + offs, dx.to(dbranch_ptr.dtype.element_ty), mask=inside)
        if AGAIN:
            tl.store(y_ptr + row * width + offs, (normed * weight).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(sums_ptr + tl.program_id(0) * width + offs, dweight, mask=inside)


def norm_forward(x, branch, weight, eps):
    """(y in weight's dtype, scale [rows], sum in x's dtype) for x + branch, or for x and without a sum: branch None."""
    flat, weight = rows_of(x), weight.contiguous()
    rows, d = flat.shape
    y = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device) if branch is not None else None
    other = rows_of(branch) if branch is not None else flat
    block = triton.next_power_of_2(d)
    if rows:
        _norm_forward_kernel[(rows,)](
            flat, other, weight, y, total if total is not None else y, scale, d, flat.stride(0), other.stride(0), eps,
            HAS_BRANCH=branch is not None, BLOCK=block, num_warps=row_warps(block),
        )  # fmt: skip
    return y, scale, total


@torch.library.custom_op("megatron_taipan::rms_norm_forward", mutates_args=())
def _norm_forward_op(x: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    return norm_forward(x, None, weight, eps)[:2]


@_norm_forward_op.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape, dtype=weight.dtype), x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32)


@torch.library.custom_op("megatron_taipan::add_rms_norm_forward", mutates_args=())
def _add_norm_forward_op(
    h: torch.Tensor, branch: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return norm_forward(h, branch, weight, eps)


@_add_norm_forward_op.register_fake
def _(h, branch, weight, eps):
    scale = h.new_empty(h.numel() // h.shape[-1], dtype=torch.float32)
    return h.new_empty(h.shape, dtype=weight.dtype), scale, h.new_empty(h.shape)


@torch.library.custom_op("megatron_taipan::rms_norm_backward", mutates_args=())
def norm_backward(
    dy: torch.Tensor, x: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor, scale: torch.Tensor,
    residual: torch.Tensor | None, second: torch.dtype | None, again: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Of the norm of x + branch, or of x: (dx, the weight's gradient, dx once more in the type `second`, the norm
    `again`), the last two or empty."""
    flat, dflat, weight = rows_of(x), rows_of(dy), weight.contiguous()
    rows, d = flat.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dbranch = torch.empty(x.shape if second is not None else 0, dtype=second, device=x.device)
    y = torch.empty(x.shape if again else 0, dtype=weight.dtype, device=x.device)
    programs = max(1, min(rows, PROGRAMS))
    sums = torch.empty((programs, d), dtype=torch.float32, device=x.device)
    other, narrow = (rows_of(t) if t is not None else dflat for t in (residual, branch))
    block = triton.next_power_of_2(d)
    _norm_backward_kernel[(programs,)](
        dflat, flat, narrow, weight, scale, other, dx, dbranch if second is not None else dx, y if again else dx, sums,
        rows, d, flat.stride(0), narrow.stride(0), dflat.stride(0), other.stride(0), HAS_BRANCH=branch is not None,
        HAS_RESIDUAL=residual is not None, TWICE=second is not None, AGAIN=again, BLOCK=block,
        num_warps=row_warps(block),
    )  # fmt: skip
    return dx, column_sums(sums, weight.dtype), dbranch, y


@norm_backward.register_fake
def _(dy, x, branch, weight, scale, residual, second, again):
    dbranch = x.new_empty(x.shape if second is not None else 0, dtype=second)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbranch, weight.new_empty(x.shape if again else 0)


def _save_norm(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], None, inputs[1], output[1])


def _norm_backward(ctx, dy, _dscale):
    dx, dweight, *_ = norm_backward(dy, *ctx.saved_tensors, None, None, False)
    return dx, dweight, None


_norm_forward_op.register_autograd(_norm_backward, setup_context=_save_norm)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """As `rms_norm_reference`."""
    return _norm_forward_op(x, weight, eps)[0]


def sum_and_norm(h, branch, weight, eps, kept):
    """(norm of h + branch, h + branch, what `norm_backward` needs for the sum: x, branch, weight, scale)."""
    if branch is None:
        u, scale = _norm_forward_op(h, weight, eps)
        return u, h.view_as(h), (h, None, weight, scale)
    u, scale, total = _add_norm_forward_op(h, branch, weight, eps)
    return u, total, (*((h, branch) if keeps_summands(h, branch, kept) else (total, None)), weight, scale)


def gradients_of_both(dh, dbranch, branch_dtype):
    """What `norm_backward` gives as gradients of h and branch: of one type they are one tensor, as of torch's sum."""
    return dh, (dh if branch_dtype == dh.dtype else dbranch) if branch_dtype is not None else None


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, branch, weight, eps, kept):
        u, total, needed = sum_and_norm(h, branch, weight, eps, kept)
        ctx.save_for_backward(*needed)
        ctx.branch_dtype = branch.dtype if branch is not None else None
        return u, total

    @staticmethod
    def backward(ctx, du, dtotal):
        x, *needed = ctx.saved_tensors
        second = ctx.branch_dtype if ctx.branch_dtype != x.dtype else None
        dh, dweight, dbranch, _ = norm_backward(du, x, *needed, dtotal, second, False)
        return *gradients_of_both(dh, dbranch, ctx.branch_dtype), dweight, None, None


def add_rms_norm(
    h: torch.Tensor, branch: torch.Tensor | None, weight: torch.Tensor, eps: float, kept: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `add_rms_norm_reference`.

    The forward kernel normalizes the sum while it holds it. The backward kernel adds the stream's gradient to the
    norm's and writes the sum in both types, h's and the branch's; autograd would read and write the whole stream once
    more for each.
    """
    return _AddNorm.apply(h, branch, weight, eps, kept)
