# ruff: noqa: E501  (kernel signatures and tuples of results are one line each)
"""Interval attention in Triton: query i attends the keys lo[i]..hi[i], both ends included.

Because lo and hi never fall along the queries, a block of queries needs one contiguous range of keys and a block of
keys is needed by one contiguous range of queries: no block lists, nothing read by the host. The softmax is computed
online over the key blocks (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2), in base 2.

Three kernels:
    forward   one program per block of queries and head; keeps the log-sum-exp of each row
    dq        one program per block of queries and head; also writes delta = rowsum(o * do)
    dk, dv    one program per block of keys and key head, over all query heads of its group

No program writes what another one reads or writes, so results are deterministic.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = 1.4426950408889634
FAR = 2**30  # beyond every key


@triton.jit
def _attend(acc, row_sum, row_max, q, k_tiles, v_tiles, column, lo, hi, start, end, scale_log2,
            BLOCK_K: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """One online-softmax pass over the keys start..end-1 in steps of BLOCK_K; tiles past the last key read zeros."""
    offs_k = tl.arange(0, BLOCK_K)
    for first in tl.range(start, end, BLOCK_K):
        keys = first + offs_k
        k = k_tiles.load([first, column])
        v = v_tiles.load([first, column])
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2  # [BLOCK_Q, BLOCK_K]
        if MASKED:
            s = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] <= hi[:, None]), s, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        if MASKED:
            # a row that has met no key yet has maximum -inf; 0 in its place keeps -inf - -inf out
            shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        else:
            shift = new_max
        p = tl.exp2(s - shift[:, None])
        old = tl.exp2(row_max - shift)
        row_sum = row_sum * old + tl.sum(p, 1)
        acc = acc * old[:, None]
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def _block_interval(lo_ptr, hi_ptr, rows, n_queries, FAR: tl.constexpr):
    """lo and hi of a block of queries; rows without keys get lo = FAR, hi = -1, so that every key is masked."""
    valid = rows < n_queries
    lo = tl.load(lo_ptr + rows, mask=valid, other=FAR)
    hi = tl.load(hi_ptr + rows, mask=valid, other=-1)
    empty = lo > hi
    return tl.where(empty, FAR, lo), tl.where(empty, -1, hi)


@triton.jit
def _whole_blocks(lo, hi, BLOCK_K: tl.constexpr):
    """(start, first whole, end of whole, end): key positions; blocks in between need no mask for any row."""
    start = tl.min(lo, 0)
    end = tl.max(hi, 0) + 1
    whole = start + tl.cdiv(tl.minimum(tl.max(lo, 0), end) - start, BLOCK_K) * BLOCK_K
    whole_end = start + ((tl.min(hi, 0) + 1 - start) // BLOCK_K) * BLOCK_K
    whole = tl.minimum(whole, start + tl.cdiv(end - start, BLOCK_K) * BLOCK_K)
    return start, whole, tl.maximum(whole, whole_end), end


@triton.jit
def _forward_kernel(q_ptr, k_tiles, v_tiles, o_ptr, lse_ptr, lo_ptr, hi_ptr, n_queries,
                    stride_qn, stride_qh, stride_on, stride_oh,
                    scale_log2, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                    PRECISION: tl.constexpr, FAR: tl.constexpr):  # fmt: skip
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_d = tl.arange(0, D)
    valid = rows < n_queries
    lo, hi = _block_interval(lo_ptr, hi_ptr, rows, n_queries, FAR)
    start, whole, whole_end, end = _whole_blocks(lo, hi, BLOCK_K)
    o_ptrs = o_ptr + rows.to(tl.int64)[:, None] * stride_on + head * stride_oh + offs_d[None, :]
    lse_ptrs = lse_ptr + head.to(tl.int64) * n_queries + rows
    if start >= end:  # only padding here
        tl.store(o_ptrs, tl.zeros([BLOCK_Q, D], tl.float32).to(o_ptr.dtype.element_ty), mask=valid[:, None])
        tl.store(lse_ptrs, tl.zeros([BLOCK_Q], tl.float32), mask=valid)
        return
    q = tl.load(q_ptr + rows.to(tl.int64)[:, None] * stride_qn + head * stride_qh + offs_d[None, :],
                mask=valid[:, None], other=0.0)  # fmt: skip
    column = (head // GROUP) * D
    acc = tl.zeros([BLOCK_Q, D], tl.float32)
    row_sum = tl.zeros([BLOCK_Q], tl.float32)
    row_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    acc, row_sum, row_max = _attend(acc, row_sum, row_max, q, k_tiles, v_tiles, column, lo, hi, start, whole,
                                    scale_log2, BLOCK_K, True, PRECISION)  # fmt: skip
    acc, row_sum, row_max = _attend(acc, row_sum, row_max, q, k_tiles, v_tiles, column, lo, hi, whole, whole_end,
                                    scale_log2, BLOCK_K, False, PRECISION)  # fmt: skip
    acc, row_sum, row_max = _attend(acc, row_sum, row_max, q, k_tiles, v_tiles, column, lo, hi, whole_end, end,
                                    scale_log2, BLOCK_K, True, PRECISION)  # fmt: skip
    some = row_sum > 0
    acc = acc / tl.where(some, row_sum, 1.0)[:, None]
    lse = tl.where(some, row_max + tl.log2(tl.where(some, row_sum, 1.0)), 0.0)
    tl.store(o_ptrs, acc.to(o_ptr.dtype.element_ty), mask=valid[:, None])
    tl.store(lse_ptrs, lse, mask=valid)


@triton.jit
def _dq_pass(dq, q, do, lse, delta, k_tiles, v_tiles, column, lo, hi, start, end, scale_log2,
             BLOCK_K: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Adds ds @ k over the keys start..end-1; the scale is applied once at the end."""
    offs_k = tl.arange(0, BLOCK_K)
    for first in tl.range(start, end, BLOCK_K):
        keys = first + offs_k
        k = k_tiles.load([first, column])
        v = v_tiles.load([first, column])
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        p = tl.exp2(s * scale_log2 - lse[:, None])
        if MASKED:
            p = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] <= hi[:, None]), p, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _dq_kernel(q_ptr, k_tiles, v_tiles, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, lo_ptr, hi_ptr, n_queries,
               stride_qn, stride_qh, stride_on, stride_oh,
               stride_don, stride_doh, stride_dqn, stride_dqh, scale, scale_log2, GROUP: tl.constexpr,
               D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
               FAR: tl.constexpr):  # fmt: skip
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    rows64 = rows.to(tl.int64)
    offs_d = tl.arange(0, D)
    valid = rows < n_queries
    lo, hi = _block_interval(lo_ptr, hi_ptr, rows, n_queries, FAR)
    start, whole, whole_end, end = _whole_blocks(lo, hi, BLOCK_K)
    dq_ptrs = dq_ptr + rows64[:, None] * stride_dqn + head * stride_dqh + offs_d[None, :]
    row_ptrs = head.to(tl.int64) * n_queries + rows
    if start >= end:
        tl.store(dq_ptrs, tl.zeros([BLOCK_Q, D], tl.float32).to(dq_ptr.dtype.element_ty), mask=valid[:, None])
        tl.store(delta_ptr + row_ptrs, tl.zeros([BLOCK_Q], tl.float32), mask=valid)
        return
    inside = valid[:, None]
    do = tl.load(do_ptr + rows64[:, None] * stride_don + head * stride_doh + offs_d[None, :], mask=inside, other=0.0)
    o = tl.load(o_ptr + rows64[:, None] * stride_on + head * stride_oh + offs_d[None, :], mask=inside, other=0.0)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta_ptr + row_ptrs, delta, mask=valid)
    q = tl.load(q_ptr + rows64[:, None] * stride_qn + head * stride_qh + offs_d[None, :], mask=inside, other=0.0)
    lse = tl.load(lse_ptr + row_ptrs, mask=valid, other=0.0)
    column = (head // GROUP) * D
    dq = tl.zeros([BLOCK_Q, D], tl.float32)
    dq = _dq_pass(dq, q, do, lse, delta, k_tiles, v_tiles, column, lo, hi, start, whole, scale_log2, BLOCK_K, True,
                  PRECISION)  # fmt: skip
    dq = _dq_pass(dq, q, do, lse, delta, k_tiles, v_tiles, column, lo, hi, whole, whole_end, scale_log2, BLOCK_K, False,
                  PRECISION)  # fmt: skip
    dq = _dq_pass(dq, q, do, lse, delta, k_tiles, v_tiles, column, lo, hi, whole_end, end, scale_log2, BLOCK_K, True,
                  PRECISION)  # fmt: skip
    tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=valid[:, None])


@triton.jit
def _dkv_kernel(q_tiles, k_ptr, v_ptr, do_tiles, lse_ptr, delta_ptr, dk_ptr, dv_ptr, lo_ptr, hi_ptr, first_ptr, last_ptr,
                n_queries, n_keys, stride_kn, stride_kh, stride_vn, stride_vh, stride_dkn, stride_dkh, scale, scale_log2, GROUP: tl.constexpr,
                D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
                FAR: tl.constexpr):  # fmt: skip
    kv_head = tl.program_id(1)
    block = tl.program_id(0)
    keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = keys < n_keys
    offs_d = tl.arange(0, D)
    offs_q = tl.arange(0, BLOCK_Q)
    keys64 = keys.to(tl.int64)
    first = tl.load(first_ptr + block)  # queries first..last-1 touch this block of keys
    last = tl.load(last_ptr + block)
    k = tl.load(k_ptr + keys64[:, None] * stride_kn + kv_head * stride_kh + offs_d[None, :], mask=inside[:, None],
                other=0.0)  # fmt: skip
    v = tl.load(v_ptr + keys64[:, None] * stride_vn + kv_head * stride_vh + offs_d[None, :], mask=inside[:, None],
                other=0.0)  # fmt: skip
    dk = tl.zeros([BLOCK_K, D], tl.float32)
    dv = tl.zeros([BLOCK_K, D], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        stat = head.to(tl.int64) * n_queries
        for at in tl.range(first, last, BLOCK_Q):
            rows = at + offs_q
            valid = rows < n_queries
            lo = tl.load(lo_ptr + rows, mask=valid, other=FAR)
            hi = tl.load(hi_ptr + rows, mask=valid, other=-1)
            q = q_tiles.load([at, head * D])  # rows past `last` are masked by their intervals
            do = do_tiles.load([at, head * D])
            lse = tl.load(lse_ptr + stat + rows, mask=valid, other=0.0)
            delta = tl.load(delta_ptr + stat + rows, mask=valid, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_K, BLOCK_Q]
            p = tl.exp2(s * scale_log2 - lse[None, :])
            p = tl.where((keys[:, None] >= lo[None, :]) & (keys[:, None] <= hi[None, :]), p, 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    at = keys64[:, None] * stride_dkn + kv_head * stride_dkh + offs_d[None, :]
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside[:, None])
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _ranges_kernel(lo_ptr, hi_ptr, first_ptr, last_ptr, n_queries, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr):
    """first, last of one block of keys: the least range of queries that holds every row touching it."""
    start = tl.program_id(0) * BLOCK_K
    first = tl.zeros([BLOCK], tl.int32) + n_queries
    last = tl.zeros([BLOCK], tl.int32)
    for at in range(0, n_queries, BLOCK):
        rows = at + tl.arange(0, BLOCK)
        lo = tl.load(lo_ptr + rows, mask=rows < n_queries, other=1)
        hi = tl.load(hi_ptr + rows, mask=rows < n_queries, other=0)
        touches = (lo <= hi) & (hi >= start) & (lo < start + BLOCK_K)
        first = tl.where(touches, tl.minimum(first, rows), first)
        last = tl.where(touches, tl.maximum(last, rows + 1), last)
    tl.store(first_ptr + tl.program_id(0), tl.min(first, 0))
    tl.store(last_ptr + tl.program_id(0), tl.max(last, 0))


def launch_options(kernel: str, dtype: torch.dtype, head_dim: int) -> dict[str, int]:
    """Block sizes and launch parameters, measured on an H100 (docs/lab-notes.md); float32 tiles must be smaller."""
    if dtype == torch.float32:
        return {"BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2 if head_dim <= 64 else 1}
    table = {
        "forward": {"BLOCK_Q": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
        "dq": {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
        "dkv": {"BLOCK_Q": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
    }
    return table[kernel]


def _precision(dtype: torch.dtype) -> str:
    """How Triton multiplies float32 tiles: exactly, unless the user allowed TF32 products."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _tiles(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """x [n, h, d] as tiles of `rows` tokens of one head, moved by the copy engine; reads past the end give zeros."""
    n, h, d = x.shape
    return TensorDescriptor(x, [n, h * d], [x.stride(0), 1], [rows, d])


def _tileable(x: torch.Tensor) -> torch.Tensor:
    """x [n, h, d], copied where its heads are not side by side or its rows not aligned to 16 bytes."""
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    return x if aligned and x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


@torch.library.custom_op("megatron_taipan::interval_attention_forward", mutates_args=())
def _forward_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o [nq, hq, d], log-sum-exp in base 2 [hq, nq] float32)."""
    q, k, v = _tileable(q), _tileable(k), _tileable(v)
    nq, hq, d = q.shape
    nk, hk, _ = k.shape
    o = torch.empty((nq, hq, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((hq, nq), dtype=torch.float32, device=q.device)
    if nq:
        options = launch_options("forward", q.dtype, d)
        _forward_kernel[(triton.cdiv(nq, options["BLOCK_Q"]), hq)](
            q, _tiles(k, options["BLOCK_K"]), _tiles(v, options["BLOCK_K"]), o, lse, lo, hi, nq, q.stride(0),
            q.stride(1), o.stride(0), o.stride(1), LOG2E / d**0.5, GROUP=hq // hk, D=d,
            PRECISION=_precision(q.dtype), FAR=FAR, **options,
        )  # fmt: skip
    return o, lse


@_forward_op.register_fake
def _(q, k, v, lo, hi):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("megatron_taipan::interval_attention_backward", mutates_args=())
def _backward_op(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor,
    lo: torch.Tensor, hi: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv)."""
    do, q, k, v = _tileable(do), _tileable(q), _tileable(k), _tileable(v)
    nq, hq, d = q.shape
    nk, hk, _ = k.shape
    dq = torch.empty((nq, hq, d), dtype=q.dtype, device=q.device)
    dk = torch.empty((nk, hk, d), dtype=k.dtype, device=k.device)
    dv = torch.empty((nk, hk, d), dtype=v.dtype, device=v.device)
    scale, precision = d**-0.5, _precision(q.dtype)
    delta = torch.empty_like(lse)
    if nq:
        options = launch_options("dq", q.dtype, d)
        _dq_kernel[(triton.cdiv(nq, options["BLOCK_Q"]), hq)](
            q, _tiles(k, options["BLOCK_K"]), _tiles(v, options["BLOCK_K"]), o, do, lse, delta, dq, lo, hi, nq,
            q.stride(0), q.stride(1), o.stride(0), o.stride(1), do.stride(0), do.stride(1), dq.stride(0),
            dq.stride(1), scale, scale * LOG2E, GROUP=hq // hk, D=d, PRECISION=precision, FAR=FAR, **options,
        )  # fmt: skip
    if nk:
        options = launch_options("dkv", q.dtype, d)
        blocks = triton.cdiv(nk, options["BLOCK_K"])
        first, last = torch.empty((2, blocks), dtype=torch.int32, device=q.device)
        _ranges_kernel[(blocks,)](lo, hi, first, last, nq, BLOCK_K=options["BLOCK_K"], BLOCK=1024)
        _dkv_kernel[(blocks, hk)](
            _tiles(q, options["BLOCK_Q"]), k, v, _tiles(do, options["BLOCK_Q"]), lse, delta, dk, dv, lo, hi, first, last,
            nq, nk, k.stride(0), k.stride(1), v.stride(0), v.stride(1), dk.stride(0), dk.stride(1), scale, scale * LOG2E, GROUP=hq // hk, D=d, PRECISION=precision, FAR=FAR, **options,
        )  # fmt: skip
    return dq, dk, dv


@_backward_op.register_fake
def _(do, q, k, v, o, lse, lo, hi):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])


def _backward(ctx, do, _dlse):
    q, k, v, o, lse, lo, hi = ctx.saved_tensors
    return *_backward_op(do, q, k, v, o, lse, lo, hi), None, None


_forward_op.register_autograd(_backward, setup_context=_save)


def supports(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether the kernels take these tensors: head size 16 to 128 and a power of two, floating point up to 32 bits."""
    d = q.shape[-1]
    return q.dtype in (torch.bfloat16, torch.float16, torch.float32) and 16 <= d <= 128 and d & (d - 1) == 0


def interval_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor
) -> torch.Tensor:
    """Attention of query i over the keys lo[i]..hi[i], scale 1/sqrt(d).

    Args:
        q: [nq, hq, d]; k, v: [nk, hk, d] with hq a multiple of hk (grouped-query attention).
        lo, hi: [nq] int32, 0 <= lo and hi < nk, both non-decreasing among the rows with lo <= hi; lo[i] > hi[i] means
            no key: output and gradients of that row are 0, which is how buffers of fixed capacity are padded.

    Returns:
        o [nq, hq, d], of q's dtype; softmax and sums are float32.
    """
    return _forward_op(q, k, v, lo.contiguous(), hi.contiguous())[0]
