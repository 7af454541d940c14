"""Products over the selected rows of a token axis, bounded by a count that stays on the device.

Buffers are large enough for all rows of the axis, so nothing overflows and no shape depends on the data; a program whose
rows are beyond the count ends at once. One more tile than needed is written, as zeros: kernels that read a buffer in
tiles of up to 128 rows find zeros there, never what the memory contained before.

Grids have one dimension, since a second one ends at 65,535: with tiles of 8 rows that were 524,280.
"""

import torch
import triton
import triton.language as tl

from megatron_taipan.ops.selected_rows import (
    Rows,
    bounded_linear_reference,
    gather_linear_reference,
    scatter_rows_reference,
)

TILE = 128  # rows of a tile; consumers read ahead by at most this many


@triton.jit
def _rows_kernel(a_ptr, b_ptr, c_ptr, index_ptr, count_ptr, capacity, n_out, n_in, a_row, b_out, b_in, c_row,
                 GATHER: tl.constexpr, SCATTER: tl.constexpr, ADD: tl.constexpr, BLOCK_M: tl.constexpr,
                 BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """c[m or index[m], j] = sum_k a[m or index[m], k] * b[j, k] for the rows m below the count; ADD: += instead."""
    across = tl.cdiv(n_out, BLOCK_N)
    first = tl.program_id(0) // across * BLOCK_M
    count = tl.load(count_ptr)
    ahead = 0 if SCATTER else BLOCK_M
    if first >= count + ahead:
        return
    rows = first + tl.arange(0, BLOCK_M)
    real = rows < count
    place = tl.load(index_ptr + rows, mask=real, other=0)
    source = place if GATHER else rows.to(tl.int64)
    out = tl.program_id(0) % across * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + source[:, None] * a_row + offs_k[None, :]
    b_ptrs = b_ptr + out[None, :].to(tl.int64) * b_out + offs_k[:, None] * b_in
    inside = out < n_out
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, n_in, BLOCK_K):
        left = offs_k < n_in - k
        a = tl.load(a_ptrs, mask=real[:, None] & left[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=left[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_ptrs += BLOCK_K
        b_ptrs += BLOCK_K * b_in
    target = place if SCATTER else rows.to(tl.int64)
    written = (real if SCATTER else rows < capacity)[:, None] & inside[None, :]
    c_ptrs = c_ptr + target[:, None] * c_row + out[None, :]
    if ADD:
        acc += tl.load(c_ptrs, mask=written, other=0.0).to(tl.float32)
    tl.store(c_ptrs, acc.to(c_ptr.dtype.element_ty), mask=written)


@triton.jit
def _weight_kernel(dy_ptr, x_ptr, dw_ptr, index_ptr, count_ptr, n_out, n_in, dy_row, x_row, GATHER: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dw[j, k] = sum over the rows m below the count of dy[m, j] * x[m or index[m], k]."""
    count = tl.load(count_ptr)
    out = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    into = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_m = tl.arange(0, BLOCK_M)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for first in range(0, count, BLOCK_M):
        rows = first + offs_m
        real = rows < count
        source = tl.load(index_ptr + rows, mask=real, other=0) if GATHER else rows.to(tl.int64)
        dy = tl.load(dy_ptr + rows.to(tl.int64)[:, None] * dy_row + out[None, :],
                     mask=real[:, None] & (out < n_out)[None, :], other=0.0)  # fmt: skip
        x = tl.load(x_ptr + source[:, None] * x_row + into[None, :], mask=real[:, None] & (into < n_in)[None, :],
                    other=0.0)  # fmt: skip
        acc = tl.dot(tl.trans(dy), x, acc, input_precision=PRECISION)
    tl.store(dw_ptr + out.to(tl.int64)[:, None] * n_in + into[None, :], acc.to(dw_ptr.dtype.element_ty),
             mask=(out < n_out)[:, None] & (into < n_in)[None, :])  # fmt: skip


@triton.jit
def _copy_kernel(source_ptr, target_ptr, index_ptr, count_ptr, capacity, width, source_row, target_row,
                 SCATTER: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """target[index[m]] = source[m] (SCATTER) or target[m] = source[index[m]], for the rows m below the count."""
    across = tl.cdiv(width, BLOCK)
    first = tl.program_id(0) // across * BLOCK_M
    count = tl.load(count_ptr)
    if SCATTER:
        if first >= count:
            return
    elif first >= tl.cdiv(count, BLOCK_M) * BLOCK_M + 128:
        return
    rows = first + tl.arange(0, BLOCK_M)
    real = rows < count
    place = tl.load(index_ptr + rows, mask=real, other=0)
    at = tl.program_id(0) % across * BLOCK + tl.arange(0, BLOCK)
    inside = (at < width)[None, :]
    source = rows.to(tl.int64) if SCATTER else place
    target = place if SCATTER else rows.to(tl.int64)
    x = tl.load(source_ptr + source[:, None] * source_row + at[None, :], mask=real[:, None] & inside, other=0.0)
    written = real if SCATTER else rows < capacity
    tl.store(target_ptr + target[:, None] * target_row + at[None, :], x, mask=written[:, None] & inside)


def _options(dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.float32:
        return {"BLOCK_M": TILE, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": TILE, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def rows_product(
    a, weight, rows: Rows, out, *, transposed: bool, gather: bool, scatter: bool, add: bool = False
) -> torch.Tensor:
    """Writes the product of the selected rows of `a` with weight^T (or weight, where transposed) into `out`, or adds it
    there."""
    n_out, n_in = weight.shape[::-1] if transposed else weight.shape
    b_in, b_out = weight.stride() if transposed else weight.stride()[::-1]
    options = _options(a.dtype)
    capacity = len(rows.at)
    grid = (triton.cdiv(n_out, options["BLOCK_N"]) * triton.cdiv(capacity, options["BLOCK_M"]),)
    _rows_kernel[grid](
        a, weight, out, rows.at.contiguous(), rows.n_valid, capacity, n_out, n_in, a.stride(0), b_out, b_in, out.stride(0),
        GATHER=gather, SCATTER=scatter, ADD=add, PRECISION=_precision(a.dtype), **options,
    )  # fmt: skip
    return out


def weight_gradient(dy, x, rows: Rows, weight, *, gather: bool) -> torch.Tensor:
    """dy^T x over the selected rows, [e, d] like the weight."""
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    narrow = 64 if dy.dtype == torch.float32 else 128
    grid = (triton.cdiv(weight.shape[0], narrow), triton.cdiv(weight.shape[1], narrow))
    _weight_kernel[grid](
        dy, x, dweight, rows.at.contiguous(), rows.n_valid, *weight.shape, dy.stride(0), x.stride(0), GATHER=gather,
        BLOCK_M=32 if dy.dtype == torch.float32 else 64, BLOCK_N=narrow, BLOCK_K=narrow,
        PRECISION=_precision(dy.dtype), num_warps=8 if narrow == 128 else 4, num_stages=3,
    )  # fmt: skip
    return dweight


def copy_rows(source, target, rows: Rows, *, scatter: bool) -> torch.Tensor:
    """Moves the selected rows between a buffer and the axis; returns target."""
    block, tile = min(1024, triton.next_power_of_2(source.shape[1])), 8
    grid = (triton.cdiv(source.shape[1], block) * triton.cdiv(len(rows.at), tile),)
    _copy_kernel[grid](
        source, target, rows.at.contiguous(), rows.n_valid, len(rows.at), source.shape[1], source.stride(0), target.stride(0),
        SCATTER=scatter, BLOCK_M=tile, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return target


def _plain(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _RowsLinear(torch.autograd.Function):
    """gather: the operand is the whole axis [n, d]; else a buffer [capacity, d] of the rows themselves."""

    @staticmethod
    def forward(ctx, x, weight, index, count, gather):
        x, rows = _plain(x), Rows(index, count)
        ctx.save_for_backward(x, weight, index, count)
        ctx.gather = gather
        out = torch.empty((len(index), weight.shape[0]), dtype=x.dtype, device=x.device)
        return rows_product(x, weight, rows, out, transposed=False, gather=gather, scatter=False)

    @staticmethod
    def backward(ctx, dy):
        x, weight, *rows = ctx.saved_tensors
        dy, rows = _plain(dy), Rows(*rows)
        dx = dweight = None
        if ctx.needs_input_grad[0]:
            into = (torch.zeros if ctx.gather else torch.empty)(x.shape, dtype=x.dtype, device=x.device)
            dx = rows_product(dy, weight, rows, into, transposed=True, gather=False, scatter=ctx.gather)
        if ctx.needs_input_grad[1]:
            dweight = weight_gradient(dy, x, rows, weight, gather=ctx.gather)
        return dx, dweight, None, None, None


class _ScatterRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, index, count, n, onto):
        ctx.save_for_backward(index, count)
        ctx.shape = x.shape
        # a copy: what is recomputed selectively may have kept `onto`, and takes no change of it
        if onto is None:
            whole = torch.zeros((n, x.shape[1]), dtype=x.dtype, device=x.device)
        else:
            whole = onto.clone(memory_format=torch.contiguous_format)
        return copy_rows(_plain(x), whole, Rows(index, count), scatter=True)

    @staticmethod
    def backward(ctx, dwhole):
        buffer = torch.empty(ctx.shape, dtype=dwhole.dtype, device=dwhole.device)
        return copy_rows(_plain(dwhole), buffer, Rows(*ctx.saved_tensors), scatter=False), None, None, None, None


def select_rows(like: torch.Tensor, selected: torch.Tensor) -> Rows:
    """As `select_rows_reference`, without waiting for the device: index has n entries."""
    n = len(selected)
    running = selected.cumsum(0)  # int64: how many up to and including this one
    place = torch.where(selected, running - 1, n)
    tokens = torch.arange(n, device=selected.device)
    index = torch.zeros(n + 1, dtype=torch.int64, device=selected.device).scatter_(0, place, tokens)
    index[n:].zero_()  # every unpicked token was thrown there
    return Rows(index[:n], running[-1:].int())


def gather_linear(x: torch.Tensor, weight: torch.Tensor, rows: Rows) -> torch.Tensor:
    """As `gather_linear_reference`; rows beyond the count: zeros for one tile, then anything."""
    if rows.n_valid is None:
        return gather_linear_reference(x, weight, rows)
    return _RowsLinear.apply(x, weight, *rows, True)


def bounded_linear(x: torch.Tensor, weight: torch.Tensor, rows: Rows) -> torch.Tensor:
    """As `bounded_linear_reference`; rows beyond the count: zeros for one tile, then anything."""
    if rows.n_valid is None:
        return bounded_linear_reference(x, weight, rows)
    return _RowsLinear.apply(x, weight, *rows, False)


def scatter_rows(x: torch.Tensor, rows: Rows, n: int, onto: torch.Tensor | None = None) -> torch.Tensor:
    """As `scatter_rows_reference`."""
    if rows.n_valid is None:
        return scatter_rows_reference(x, rows, n, onto)
    return _ScatterRows.apply(x, *rows, n, onto)
