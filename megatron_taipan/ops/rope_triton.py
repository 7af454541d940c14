"""The rotary embedding in Triton: one pass forward, the opposite turn backward, nothing saved but the tables.

Plain torch takes a dozen passes over float32 copies of the queries and of the keys, each way.
"""

import torch
import triton
import triton.language as tl

ROWS = 16  # of a program; a row is one head of one token


@triton.jit
def _rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, rows, heads, token_stride, head_stride, HALF: tl.constexpr, WIDTH: tl.constexpr,
    SIGN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A block of rows; HALF: d / 2; WIDTH: the power of two above it; SIGN: -1 turns back."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    at = tl.arange(0, WIDTH)[None, :]
    mask = (row < rows) & (at < HALF)
    token, head = row // heads, row % heads
    x = x_ptr + token * token_stride + head * head_stride + at
    a = tl.load(x, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x + HALF, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + token * HALF + at, mask=mask, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + at, mask=mask, other=0.0) * SIGN
    out = out_ptr + row * (2 * HALF) + at
    tl.store(out, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(out + HALF, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=mask)


@torch.library.custom_op("megatron_taipan::rotate", mutates_args=())
def _rotate_op(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    n, heads, d = x.shape
    out = torch.empty((n, heads, d), dtype=x.dtype, device=x.device)
    if out.numel():
        _rotate_kernel[(triton.cdiv(n * heads, ROWS),)](
            x, cos, sin, out, n * heads, heads, x.stride(0), x.stride(1), HALF=d // 2,
            WIDTH=triton.next_power_of_2(d // 2), SIGN=sign, ROWS=ROWS, num_warps=4,
        )  # fmt: skip
    return out


@_rotate_op.register_fake
def _(x, cos, sin, sign):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    _, cos, sin, ctx.sign = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, dout):
    cos, sin = ctx.saved_tensors
    return _rotate_op(dout, cos, sin, -ctx.sign), None, None, None


_rotate_op.register_autograd(_backward, setup_context=_save)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As `rotate_reference`."""
    return _rotate_op(x, cos.contiguous(), sin.contiguous(), 1)
