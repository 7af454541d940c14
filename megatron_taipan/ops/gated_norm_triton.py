"""The gated RMSNorm of Mamba-2 in Triton: one pass over memory forward, one backward.

The backward kernel keeps the gradient of the weight in registers while a program walks over its rows, and writes one
partial sum a program.

A group that is spread over ranks costs one more read each way: a first kernel finds this rank's part of each row's sum,
the ranks add theirs up, and the kernels take the total instead of summing themselves.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from megatron_taipan.ops.column_sums_triton import column_sums
from megatron_taipan.ops.rowwise import row_warps, rows_of


@triton.jit
def _gated_squares_kernel(y_ptr, z_ptr, sums_ptr, group, y_row, z_row, BLOCK: tl.constexpr):
    """sums [rows, groups] = sum of (y silu(z))^2 over this rank's channels of the group."""
    row, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs = tl.arange(0, BLOCK)
    inside = offs < group
    at = g * group + offs
    y = tl.load(y_ptr + row * y_row + at, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + row * z_row + at, mask=inside, other=0.0).to(tl.float32)
    gated = y * z / (1 + tl.exp(-z))
    tl.store(sums_ptr + row * tl.num_programs(1) + g, tl.sum(gated * gated, 0))


@triton.jit
def _row_products_kernel(a_ptr, b_ptr, sums_ptr, group, a_row, b_row, BLOCK: tl.constexpr):
    """sums [rows, groups] = sum of a b over this rank's channels of the group."""
    row, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs = tl.arange(0, BLOCK)
    inside = offs < group
    at = g * group + offs
    a = tl.load(a_ptr + row * a_row + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + row * b_row + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(sums_ptr + row * tl.num_programs(1) + g, tl.sum(a * b, 0))


@triton.jit
def _gated_forward_kernel(y_ptr, z_ptr, weight_ptr, total_ptr, out_ptr, scale_ptr, group, group_size, y_row, z_row, eps,
                          SPREAD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """SPREAD: `total` [rows, groups] holds the sums of squares of the group's group_size channels on all ranks."""
    row, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    width = group * tl.num_programs(1)
    offs = tl.arange(0, BLOCK)
    inside = offs < group
    at = g * group + offs
    y = tl.load(y_ptr + row * y_row + at, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + row * z_row + at, mask=inside, other=0.0).to(tl.float32)
    gated = y * z / (1 + tl.exp(-z))
    if SPREAD:
        squares = tl.load(total_ptr + row * tl.num_programs(1) + g)
    else:
        squares = tl.sum(gated * gated, 0)
    scale = tl.rsqrt(squares / group_size + eps)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + at, (gated * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + row * tl.num_programs(1) + g, scale)


@triton.jit
def _gated_backward_kernel(dout_ptr, y_ptr, z_ptr, weight_ptr, scale_ptr, total_ptr, dy_ptr, dz_ptr, out_ptr, sums_ptr,
                           rows, group, group_size, dout_row, y_row, z_row, dy_row, dz_row, SPREAD: tl.constexpr,
                           AGAIN: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """SPREAD: `total` [rows, groups] holds the sums of dout out over the group's group_size channels on all ranks.

    AGAIN: the norm's output is written once more, as the forward kernel computes it.
    """
    g, groups = tl.program_id(1), tl.num_programs(1)
    offs = tl.arange(0, BLOCK)
    inside = offs < group
    at = g * group + offs
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK], tl.float32)
    mine = tl.program_id(0).to(tl.int64)
    for i in tl.range(0, tl.cdiv(rows - tl.program_id(0), tl.num_programs(0)), num_stages=STAGES):
        row = mine + i * tl.num_programs(0)
        y = tl.load(y_ptr + row * y_row + at, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + row * z_row + at, mask=inside, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + row * dout_row + at, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row * groups + g)
        s = 1 / (1 + tl.exp(-z))
        gate = z * s
        normed = y * gate * scale
        dweight += dout * normed
        grad = dout * weight
        if SPREAD:
            products = tl.load(total_ptr + row * groups + g)
        else:
            products = tl.sum(grad * normed, 0)
        dgated = scale * (grad - normed * (products / group_size))
        tl.store(dy_ptr + row * dy_row + at, (dgated * gate).to(dy_ptr.dtype.element_ty), mask=inside)
        dz = dgated * y * s * (1 + z * (1 - s))
        tl.store(dz_ptr + row * dz_row + at, dz.to(dz_ptr.dtype.element_ty), mask=inside)
        if AGAIN:
            out = (y * z / (1 + tl.exp(-z))) * scale * weight
            tl.store(out_ptr + row * group * groups + at, out.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(sums_ptr + (tl.program_id(0) * groups + g) * group + offs, dweight, mask=inside)


def gated_options(block: int, groups: int) -> tuple[int, int, int]:
    """(programs a group, warps, stages) of the gated norm's backward kernel, measured on an H100 for 4096 channels.

    A row's registers leave room for one program a multiprocessor, so the loads of the next rows are under way while one
    row is worked on; few programs leave few parts of the weight's gradient to add up.
    """
    return 132 * max(1, 4096 // (block * groups)), min(16, max(1, block // 256)), 3 if block <= 8192 else 1


def gated_forward(y, z, weight, eps, group_size, reduce_sum=None):
    """(out [rows, d] in weight's dtype, scale [rows, groups]) of y, z [rows, d]; reduce_sum as for `gated_rms_norm`."""
    rows, d = y.shape
    weight = weight.contiguous()
    group = min(group_size, d)
    groups = d // group
    out = torch.empty((rows, d), dtype=weight.dtype, device=y.device)
    scale = torch.empty((rows, groups), dtype=torch.float32, device=y.device)
    block = triton.next_power_of_2(group)
    total = scale  # where every group is on this rank it is not read
    if reduce_sum is not None:
        squares = torch.empty((rows, groups, 1), dtype=torch.float32, device=y.device)
        _gated_squares_kernel[(rows, groups)](
            y, z, squares, group, y.stride(0), z.stride(0), BLOCK=block, num_warps=row_warps(block)
        )
        total = reduce_sum(squares).contiguous()
    _gated_forward_kernel[(rows, groups)](
        y, z, weight, total, out, scale, group, group_size, y.stride(0), z.stride(0), eps,
        SPREAD=reduce_sum is not None, BLOCK=block, num_warps=row_warps(block),
    )  # fmt: skip
    return out, scale


def gated_backward(dout, y, z, weight, scale, dy, dz, out=None, group_size=None, reduce_sum=None, again=None):
    """Writes dy and dz [rows, d] in place, and where `again` [rows, d] is given the norm's output once more into it;
    returns the gradient of weight.

    Where groups are spread over ranks, the last three are what went into and came out of `gated_forward`. A row's sum
    of dout w normed is found as that of dout out, two reads instead of three: it weighs 1 / sqrt(group_size) in dy, so
    that the rounding of `out` is far below dy's own.
    """
    rows, d = y.shape
    weight = weight.contiguous()
    groups = scale.shape[1]
    group = d // groups
    block = triton.next_power_of_2(group)
    total = scale  # where every group is on this rank it is not read
    if reduce_sum is not None:
        products = torch.empty((rows, groups, 1), dtype=torch.float32, device=y.device)
        _row_products_kernel[(rows, groups)](
            dout, out, products, group, dout.stride(0), out.stride(0), BLOCK=block, num_warps=row_warps(block)
        )
        total = reduce_sum(products).contiguous()
    programs, warps, stages = gated_options(block, groups)
    programs = min(rows, programs)
    sums = torch.empty((programs, d), dtype=torch.float32, device=y.device)
    _gated_backward_kernel[(programs, groups)](
        dout, y, z, weight, scale, total, dy, dz, again if again is not None else dy, sums, rows, group,
        group_size or group, dout.stride(0), y.stride(0), z.stride(0), dy.stride(0), dz.stride(0),
        SPREAD=reduce_sum is not None, AGAIN=again is not None, BLOCK=block, STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return column_sums(sums, weight.dtype)


@torch.library.custom_op("megatron_taipan::gated_rms_norm_forward", mutates_args=())
def _gated_forward_op(
    y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, group_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    out, scale = gated_forward(rows_of(y), rows_of(z), weight, eps, group_size)
    return out.view(y.shape), scale


@_gated_forward_op.register_fake
def _(y, z, weight, eps, group_size):
    rows, groups = y.numel() // y.shape[-1], y.shape[-1] // group_size
    return y.new_empty(y.shape, dtype=weight.dtype), y.new_empty((rows, groups), dtype=torch.float32)


def _gated_gradients(dout, y, z, weight, scale, **spread):
    """(dy, dz, dweight), shaped as y, z and weight."""
    dy, dz = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (y, z))
    d = y.shape[-1]
    dweight = gated_backward(
        rows_of(dout), rows_of(y), rows_of(z), weight, scale, dy.view(-1, d), dz.view(-1, d), **spread
    )
    return dy, dz, dweight


@torch.library.custom_op("megatron_taipan::gated_rms_norm_backward", mutates_args=())
def _gated_backward_op(
    dout: torch.Tensor, y: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _gated_gradients(dout, y, z, weight, scale)


@_gated_backward_op.register_fake
def _(dout, y, z, weight, scale):
    return y.new_empty(y.shape), z.new_empty(z.shape), weight.new_empty(weight.shape)


def _save_gated(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], output[1])


def _gated_backward(ctx, dout, _dscale):
    return *_gated_backward_op(dout, *ctx.saved_tensors), None, None


_gated_forward_op.register_autograd(_gated_backward, setup_context=_save_gated)


class _SpreadGatedNorm(torch.autograd.Function):
    """The gated norm whose groups are spread over ranks. Not a custom op, since it calls a Python function."""

    @staticmethod
    def forward(ctx, y, z, weight, eps, group_size, reduce_sum):
        out, scale = gated_forward(rows_of(y), rows_of(z), weight, eps, group_size, reduce_sum)
        out = out.view(y.shape)
        ctx.save_for_backward(y, z, weight, scale, out)
        ctx.group_size, ctx.reduce_sum = group_size, reduce_sum
        return out

    @staticmethod
    def backward(ctx, dout):
        *saved, out = ctx.saved_tensors  # read once: under recomputation a second look is refused
        spread = {"out": rows_of(out), "group_size": ctx.group_size, "reduce_sum": ctx.reduce_sum}
        return *_gated_gradients(dout, *saved, **spread), None, None, None


def gated_rms_norm(
    y: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    *,
    eps: float,
    group_size: int,
    reduce_sum: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """As `gated_rms_norm_reference`, where every group is on this rank or reduce_sum is given.

    reduce_sum adds up float32 [rows, groups, 1] over the ranks of each group and gives every rank the total. It is
    called outside of autograd, once forward and once backward.
    """
    if reduce_sum is None:
        return _gated_forward_op(y, z, weight, eps, group_size)[0]
    return _SpreadGatedNorm.apply(y, z, weight, eps, group_size, reduce_sum)
