"""The Triton kernels of interval attention; interval_attention_triton.py launches them.

Online softmax over tiles of keys, in base 2 (FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2). Tiles of keys,
values, queries and gradients come through tensor descriptors, that is the copy engine; they read zeros past the end.
"""

import triton
import triton.language as tl


@triton.jit
def _block_interval(lo_ptr, hi_ptr, rows, n_queries, FAR: tl.constexpr):
    """lo and hi of a block of queries; rows without keys get lo = FAR, hi = -1, so that every key is masked."""
    valid = rows < n_queries
    lo = tl.load(lo_ptr + rows, mask=valid, other=FAR)
    hi = tl.load(hi_ptr + rows, mask=valid, other=-1)
    empty = lo > hi
    return tl.where(empty, FAR, lo), tl.where(empty, -1, hi)


@triton.jit
def _tile_order(start, end, BLOCK_K: tl.constexpr, QUANTUM: tl.constexpr):
    """(number of tiles, first tile) of the keys start..end-1, in circular order.

    Blocks of queries that run at the same time need overlapping ranges of keys. Each begins at the same multiple of
    about its range's length, so that all of them read a key at about the same time: one read from device memory, the
    rest from L2. In rising order the keys that a wave of programs touches between two uses of one key exceed L2.
    """
    tiles = tl.cdiv(end - start, BLOCK_K)
    period = tl.maximum(tl.cdiv(end - start, QUANTUM) * QUANTUM, QUANTUM)  # neighbours agree on it more often than not
    ahead = tl.cdiv(tl.cdiv(start, period) * period - start, BLOCK_K)
    return tiles, tl.where(ahead < tiles, ahead, 0)


@triton.jit
def _tile_start(i, first_tile, tiles, start, BLOCK_K: tl.constexpr):
    """The first key of the i-th tile in that order."""
    t = i + first_tile
    return start + tl.where(t < tiles, t, t - tiles) * BLOCK_K


@triton.jit(do_not_specialize=["n_queries"])
def forward_kernel(q_ptr, k_tiles, v_tiles, o_ptr, lse_ptr, lo_ptr, hi_ptr, n_queries, stride_qn, stride_qh, stride_on, stride_oh,
                   scale_log2, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
                   QUANTUM: tl.constexpr, PRECISION: tl.constexpr, FAR: tl.constexpr):  # fmt: skip
    """One program per block of queries and head."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    offs_d = tl.arange(0, D)
    offs_k = tl.arange(0, BLOCK_K)
    valid = rows < n_queries
    lo, hi = _block_interval(lo_ptr, hi_ptr, rows, n_queries, FAR)
    start, end = tl.min(lo, 0), tl.max(hi, 0) + 1
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
    # over every masked score: what a row adds before its first key is exp2(-huge) = 0
    row_max = tl.full([BLOCK_Q], -1e28, tl.float32)
    tiles, first_tile = _tile_order(start, end, BLOCK_K, QUANTUM)
    for i in tl.range(0, tiles):
        first = _tile_start(i, first_tile, tiles, start, BLOCK_K)
        keys = first + offs_k
        k = k_tiles.load([first, column])
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
        v = v_tiles.load([first, column])
        s = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] <= hi[:, None]), s, -1e30)
        new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2)
        p = tl.exp2(s * scale_log2 - new_max[:, None])
        old = tl.exp2(row_max - new_max)
        row_sum = row_sum * old + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * old[:, None], input_precision=PRECISION)
        row_max = new_max
    some = row_sum > 0
    acc = acc / tl.where(some, row_sum, 1.0)[:, None]
    tl.store(o_ptrs, acc.to(o_ptr.dtype.element_ty), mask=valid[:, None])
    tl.store(lse_ptrs, tl.where(some, row_max + tl.log2(tl.where(some, row_sum, 1.0)), 0.0), mask=valid)


@triton.jit(do_not_specialize=["n_queries"])
def dq_kernel(q_ptr, k_tiles, v_tiles, o_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, lo_ptr, hi_ptr, n_queries,
              stride_qn, stride_qh, stride_on, stride_oh, stride_don, stride_doh, stride_dqn, stride_dqh, scale, scale_log2,
              GROUP: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
              QUANTUM: tl.constexpr, PRECISION: tl.constexpr, FAR: tl.constexpr):  # fmt: skip
    """One program per block of queries and head; also writes delta = rowsum(o do)."""
    head = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    rows64 = rows.to(tl.int64)
    offs_d = tl.arange(0, D)
    offs_k = tl.arange(0, BLOCK_K)
    valid = rows < n_queries
    lo, hi = _block_interval(lo_ptr, hi_ptr, rows, n_queries, FAR)
    start, end = tl.min(lo, 0), tl.max(hi, 0) + 1
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
    tiles, first_tile = _tile_order(start, end, BLOCK_K, QUANTUM)
    for i in tl.range(0, tiles):
        first = _tile_start(i, first_tile, tiles, start, BLOCK_K)
        keys = first + offs_k
        k = k_tiles.load([first, column])
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
        v = v_tiles.load([first, column])
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        p = tl.exp2(s * scale_log2 - lse[:, None])
        p = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] <= hi[:, None]), p, 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    tl.store(dq_ptrs, (dq * scale).to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_queries", "n_keys"])
def dkv_kernel(q_tiles, k_tiles, v_tiles, do_tiles, lse_ptr, delta_ptr, dk_ptr, dv_ptr, lo_ptr, hi_ptr, ranges_ptr, n_queries, n_keys,
               stride_dkn, stride_dkh, scale, scale_log2, GROUP: tl.constexpr, D: tl.constexpr,
               BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr, FAR: tl.constexpr):  # fmt: skip
    """One program per block of keys and key head, over all query heads of its group.

    Scores are [queries, keys], so that what belongs to a query (lse, delta, lo, hi) is two numbers a thread. The two
    products over queries then need their tiles transposed through shared memory, which is cheaper.
    """
    kv_head = tl.program_id(1)
    block = tl.program_id(0)
    keys = block * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, D)
    offs_q = tl.arange(0, BLOCK_Q)
    first = tl.load(ranges_ptr + block)  # queries first..last-1 touch this block of keys
    last = tl.load(ranges_ptr + tl.num_programs(0) + block)
    k = k_tiles.load([block * BLOCK_K, kv_head * D])
    v = v_tiles.load([block * BLOCK_K, kv_head * D])
    dk = tl.zeros([BLOCK_K, D], tl.float32)
    dv = tl.zeros([BLOCK_K, D], tl.float32)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        stat = head.to(tl.int64) * n_queries
        for at in tl.range(first, last, BLOCK_Q):
            rows = at + offs_q  # rows past `last` are masked by their intervals
            valid = rows < n_queries
            q = q_tiles.load([at, head * D])
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_Q, BLOCK_K]
            do = do_tiles.load([at, head * D])
            dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
            lse = tl.load(lse_ptr + stat + rows, mask=valid, other=0.0)
            delta = tl.load(delta_ptr + stat + rows, mask=valid, other=0.0)
            lo = tl.load(lo_ptr + rows, mask=valid, other=FAR)
            hi = tl.load(hi_ptr + rows, mask=valid, other=-1)
            p = tl.exp2(s * scale_log2 - lse[:, None])
            p = tl.where((keys[None, :] >= lo[:, None]) & (keys[None, :] <= hi[:, None]), p, 0.0)
            dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision=PRECISION)
            ds = p * (dp - delta[:, None])
            dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision=PRECISION)
    at = keys.to(tl.int64)[:, None] * stride_dkn + kv_head * stride_dkh + offs_d[None, :]
    inside = (keys < n_keys)[:, None]
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["n_queries", "n_keys", "blocks", "steps"])
def ranges_kernel(lo_ptr, hi_ptr, ranges_ptr, n_queries, n_keys, blocks, steps, BLOCK_K: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """first [blocks], then last [blocks]: the queries first..last-1 are those that touch a block of keys.

    Two binary searches in `steps` halvings: the first row with hi >= the block's start, and the first with lo past its
    end. Rows without keys are at the end of the buffer and count as beyond both.
    """
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    start = block * BLOCK_K
    end = tl.minimum(start + BLOCK_K, n_keys)
    first, first_end = start * 0, start * 0 + n_queries
    last, last_end = first, first_end
    for _ in range(steps):
        middle, other = (first + first_end) // 2, (last + last_end) // 2
        searching, searching_last = first < first_end, last < last_end
        lo = tl.load(lo_ptr + middle, mask=searching, other=0)
        hi = tl.load(hi_ptr + middle, mask=searching, other=0)
        other_lo = tl.load(lo_ptr + other, mask=searching_last, other=0)
        other_hi = tl.load(hi_ptr + other, mask=searching_last, other=0)
        reached = (hi >= start) | (lo > hi)
        beyond = (other_lo >= end) | (other_lo > other_hi)
        first_end = tl.where(searching & reached, middle, first_end)
        first = tl.where(searching & (reached == 0), middle + 1, first)
        last_end = tl.where(searching_last & beyond, other, last_end)
        last = tl.where(searching_last & (beyond == 0), other + 1, last)
    tl.store(ranges_ptr + block, first, mask=block < blocks)
    tl.store(ranges_ptr + blocks + block, last, mask=block < blocks)
