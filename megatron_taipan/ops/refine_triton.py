"""The refinement h + weight (o - h), or h + weight o, in one pass forward and one backward, reading o only where tokens
take it."""

import torch
import triton
import triton.language as tl

from megatron_taipan.ops.rowwise import rows_of


@triton.jit
def _forward_kernel(h_ptr, o_ptr, weight_ptr, out_ptr, width, h_row, o_row, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weight_ptr + row).to(tl.float32) + tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        h = tl.load(h_ptr + row * h_row + at, mask=inside, other=0.0).to(tl.float32)
        o = tl.load(o_ptr + row * o_row + at, mask=inside & (weight != 0), other=0.0).to(tl.float32)
        out = tl.where(weight != 0, h + weight * (o if ADD else o - h), h)
        tl.store(out_ptr + row * width + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(dout_ptr, h_ptr, o_ptr, weight_ptr, dh_ptr, do_ptr, dweight_ptr, width, dout_row, h_row, o_row,
                     SKIP: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """ADD: h's gradient is dout itself, and neither h is read nor dh written."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    weight = tl.load(weight_ptr + row).to(tl.float32) + total
    for start in range(0, width, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < width
        reads = inside & (weight != 0) if SKIP else inside
        dout = tl.load(dout_ptr + row * dout_row + at, mask=inside, other=0.0).to(tl.float32)
        o = tl.load(o_ptr + row * o_row + at, mask=reads, other=0.0).to(tl.float32)
        if ADD:
            total += dout * o
        else:
            h = tl.load(h_ptr + row * h_row + at, mask=reads, other=0.0).to(tl.float32)
            total += dout * (o - h)
            tl.store(dh_ptr + row * width + at, (dout * (1 - weight)).to(dh_ptr.dtype.element_ty), mask=inside)
        tl.store(do_ptr + row * width + at, (dout * weight).to(do_ptr.dtype.element_ty), mask=inside)
    tl.store(dweight_ptr + row, tl.sum(total, 0).to(dweight_ptr.dtype.element_ty))


class _Refine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, o, weight, skip, add):
        flat, other, weights = rows_of(h), rows_of(o), weight.reshape(-1).contiguous()
        out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
        rows, width = flat.shape
        block = min(2048, triton.next_power_of_2(width))
        if rows:
            _forward_kernel[(rows,)](
                flat, other, weights, out, width, flat.stride(0), other.stride(0), ADD=add, BLOCK=block, num_warps=4
            )
        ctx.save_for_backward(other, weights, *([] if add else [flat]))
        ctx.skip, ctx.add, ctx.shape, ctx.block = skip, add, weight.shape, block
        return out

    @staticmethod
    def backward(ctx, dout):
        o, weight, *rest = ctx.saved_tensors
        h = rest[0] if rest else o  # where it is added to, it is not read
        grad = rows_of(dout)
        rows, width = o.shape
        do = torch.empty((rows, width), dtype=o.dtype, device=o.device)
        dh = grad if ctx.add else torch.empty((rows, width), dtype=h.dtype, device=h.device)
        dweight = torch.empty_like(weight)
        if rows:
            _backward_kernel[(rows,)](
                grad, h, o, weight, dh, do, dweight, width, grad.stride(0), h.stride(0), o.stride(0), SKIP=ctx.skip,
                ADD=ctx.add, BLOCK=ctx.block, num_warps=4,
            )  # fmt: skip
        return dout if ctx.add else dh.view(dout.shape), do.view(dout.shape), dweight.view(ctx.shape), None, None


def refine(h, o, weight, *, zero_is_unselected=False, add=False):
    """As `refine_reference`; where zero_is_unselected the gradient of a weight of 0 is 0."""
    return _Refine.apply(h, o, weight, zero_is_unselected, add)
