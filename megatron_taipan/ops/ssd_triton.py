# ruff: noqa: E501  (kernel signatures and tuples of results are one line each)
"""The SSD scan of Mamba-2 in Triton, forward and backward (arXiv 2405.21060, section 6).

What sets it apart from the usual five-kernel form: the scan over chunks is serial inside one program per (row, head),
the state stays in registers, and everything that a chunk needs is done while its tiles are on the chip. So x, B and C
are read once and y is written once. Rows and heads fill the GPU (4 x 64 programs in the 1.3B preset); where they do
not, the sequence is cut in segments whose incoming states are found by a first, cheaper pass.

    forward    `_scan_kernel`      state in registers; keeps the (16-bit) state that enters each chunk for backward
    backward   `_reverse_kernel`   the same, from the end: the gradient of the state that leaves each chunk
               `_scores_kernel`    B_s . C_t of each chunk, shared by the heads
               `_token_kernel`     all chunks at once: the gradients of x, dt, A, D
               `_group_kernel`     all chunks at once: the gradients of B and C, which the heads of a group share; it
                                   loops over them, so that they add up in registers

Notation in the kernels: c = position of the chunk; t, s = token in it as reader and as source; cum = running sum of
dt * A inside the chunk, times log2(e), so that every decay is one exp2. Documents (seq_idx) are islands: a pair (t, s)
counts where both have the same document; what enters a chunk belongs to the document of the token before it.
"""

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634
CHUNK = 64  # tokens handled at once: one 64 x 64 tile of scores a warpgroup; measured in docs/lab-notes.md
PROGRAMS = 256  # programs that fill the GPU in the serial kernels; fewer rows x heads are cut in segments


@triton.jit
def _softplus(u):
    """log(1 + exp(u)); a series where exp(u) is small, because the approximate logarithm loses digits near 1."""
    e = tl.exp(tl.minimum(u, 20.0))
    series = e * (1 - e * (1 / 2 - e * (1 / 3 - e * (1 / 4 - e * (1 / 5 - e * (1 / 6 - e / 7))))))
    return tl.where(u > 20.0, u, tl.where(e < 0.0625, series, tl.log(1 + e)))


@triton.jit
def _decay_kernel(dt_ptr, bias_ptr, A_ptr, dt_out_ptr, cum_ptr, length, padded, n_heads, stride_b, stride_l, stride_h,
                  SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr, LOG2E: tl.constexpr):  # fmt: skip
    """dt (after bias and softplus) and cum, both [b, h, padded length] float32; dt = 0 behind the end."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    heads = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    inside = (tokens < length)[:, None] & (heads < n_heads)[None, :]
    dt = tl.load(dt_ptr + row * stride_b + tokens.to(tl.int64)[:, None] * stride_l + heads[None, :] * stride_h,
                 mask=inside, other=0.0).to(tl.float32)  # fmt: skip
    if SOFTPLUS:
        dt = _softplus(dt + tl.load(bias_ptr + heads, mask=heads < n_heads, other=0.0)[None, :])
    dt = tl.where(inside, dt, 0.0)
    A = tl.load(A_ptr + heads, mask=heads < n_heads, other=0.0)
    cum = tl.cumsum(dt * A[None, :], 0) * LOG2E
    out = (row * n_heads + heads)[None, :] * padded + tokens[:, None]
    mask = (heads < n_heads)[None, :] & (tokens < padded)[:, None]
    tl.store(dt_out_ptr + out, dt, mask=mask)
    tl.store(cum_ptr + out, cum, mask=mask)


@triton.jit
def _documents(seq_ptr, row, tokens, first, length, CHUNK: tl.constexpr):
    """Documents of a chunk's tokens (-1 behind the end), of the token before it, and of its last token."""
    base = seq_ptr + row * length
    seq = tl.load(base + tokens, mask=tokens < length, other=-1)
    before = tl.load(base + tl.maximum(first - 1, 0))
    last = tl.load(base + tl.minimum(first + CHUNK, length) - 1)
    return seq, before, last


@triton.jit
def _scan_kernel(x_ptr, dt_ptr, cum_ptr, B_ptr, C_ptr, D_ptr, seq_ptr, init_ptr, y_ptr, states_ptr, final_ptr,
                 length, padded, n_chunks, per_segment, n_segments, n_heads, heads_per_group,
                 x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, y_b, y_l, y_h,
                 CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HAS_D: tl.constexpr, HAS_SEQ: tl.constexpr,
                 HAS_INIT: tl.constexpr, OUTPUT: tl.constexpr, KEEP: tl.constexpr, STATE: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """Scans one segment of one head. OUTPUT: write y; KEEP: write the state that enters each chunk."""
    head = tl.program_id(0)
    row = (tl.program_id(1) // n_segments).to(tl.int64)
    segment = tl.program_id(1) % n_segments
    group = head // heads_per_group
    offs_q, offs_p, offs_n = tl.arange(0, CHUNK), tl.arange(0, P), tl.arange(0, N)
    tile = offs_p[:, None] * N + offs_n[None, :]
    slot = ((row * n_segments + segment) * n_heads + head) * P * N
    state = tl.zeros([P, N], tl.float32)
    if HAS_INIT:
        state = tl.load(init_ptr + slot + tile).to(tl.float32)
    if HAS_D:
        D = tl.load(D_ptr + head).to(tl.float32)
    x_base = x_ptr + row * x_b + head * x_h
    B_base = B_ptr + row * B_b + group * B_g
    C_base = C_ptr + row * C_b + group * C_g
    y_base = y_ptr + row * y_b + head * y_h
    steps = (row * n_heads + head) * padded
    for c in tl.range(segment * per_segment, tl.minimum((segment + 1) * per_segment, n_chunks)):
        first = c * CHUNK
        tokens = first + offs_q
        inside = (tokens < length)[:, None]
        x = tl.load(x_base + tokens[:, None] * x_l + offs_p[None, :], mask=inside, other=0.0)
        B = tl.load(B_base + tokens[:, None] * B_l + offs_n[None, :], mask=inside, other=0.0)
        dt = tl.load(dt_ptr + steps + tokens)
        cum = tl.load(cum_ptr + steps + tokens)
        end = tl.load(cum_ptr + steps + first + CHUNK - 1)
        feed = tl.exp2(end - cum) * dt
        carry = tl.exp2(end)
        if HAS_SEQ:
            seq, before, last = _documents(seq_ptr, row, tokens, first, length, CHUNK)
            feed = tl.where(seq == last, feed, 0.0)
            carry = tl.where(before == last, carry, 0.0)
        if OUTPUT:
            C = tl.load(C_base + tokens[:, None] * C_l + offs_n[None, :], mask=inside, other=0.0)
            entering = state.to(STATE)
            if KEEP:
                tl.store(states_ptr + ((row * n_chunks + c) * n_heads + head) * P * N + tile, entering)
            scores = tl.dot(C, tl.trans(B), input_precision=PRECISION)  # [t, s]
            visible = offs_q[:, None] >= offs_q[None, :]
            reads = tl.exp2(cum)
            if HAS_SEQ:
                visible = visible & (seq[:, None] == seq[None, :])
                reads = tl.where(seq == before, reads, 0.0)
            weights = tl.where(visible, scores * tl.exp2(cum[:, None] - cum[None, :]) * dt[None, :], 0.0)
            y = tl.dot(C.to(STATE), tl.trans(entering), input_precision=PRECISION) * reads[:, None]
            y = tl.dot(weights.to(x.dtype), x, y, input_precision=PRECISION)
            if HAS_D:
                y += D * x.to(tl.float32)
            tl.store(y_base + tokens[:, None] * y_l + offs_p[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
        fed = (x.to(tl.float32) * feed[:, None]).to(x.dtype)
        state = tl.dot(tl.trans(fed), B, state * carry, input_precision=PRECISION)
    tl.store(final_ptr + slot + tile, state)


@triton.jit
def _reverse_kernel(dy_ptr, cum_ptr, C_ptr, seq_ptr, final_ptr, states_ptr, grads_ptr, reader_ptr, passed_ptr, initial_ptr,
                    length, padded, n_chunks, per_segment, n_segments, n_heads, heads_per_group,
                    dy_b, dy_l, dy_h, C_b, C_l, C_g,
                    CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HAS_SEQ: tl.constexpr,
                    HAS_FINAL: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """From the end of a segment to its start: the gradient of the state that leaves each chunk (KEEP), then enters.

    Since it holds that gradient in registers, it also finds what both states give to the gradient of the decays:
    reader [b, h, padded], each token's y . dy as far as it read the entering state, and passed [b, chunks, h], the
    product of the entering state and its gradient through the chunk.
    """
    head = tl.program_id(0)
    row = (tl.program_id(1) // n_segments).to(tl.int64)
    segment = tl.program_id(1) % n_segments
    offs_q, offs_p, offs_n = tl.arange(0, CHUNK), tl.arange(0, P), tl.arange(0, N)
    tile = offs_p[:, None] * N + offs_n[None, :]
    slot = ((row * n_segments + segment) * n_heads + head) * P * N
    grad = tl.zeros([P, N], tl.float32)
    if HAS_FINAL:
        grad = tl.load(final_ptr + slot + tile).to(tl.float32)
    dy_base = dy_ptr + row * dy_b + head * dy_h
    C_base = C_ptr + row * C_b + (head // heads_per_group) * C_g
    steps = (row * n_heads + head) * padded
    begin = segment * per_segment
    count = tl.minimum(begin + per_segment, n_chunks) - begin
    for i in tl.range(0, count):
        c = begin + count - 1 - i
        first = c * CHUNK
        tokens = first + offs_q
        inside = (tokens < length)[:, None]
        dy = tl.load(dy_base + tokens[:, None] * dy_l + offs_p[None, :], mask=inside, other=0.0)
        C = tl.load(C_base + tokens[:, None] * C_l + offs_n[None, :], mask=inside, other=0.0)
        cum = tl.load(cum_ptr + steps + tokens)
        carry = tl.exp2(tl.load(cum_ptr + steps + first + CHUNK - 1))
        reads = tl.exp2(cum)
        if HAS_SEQ:
            seq, before, last = _documents(seq_ptr, row, tokens, first, length, CHUNK)
            reads = tl.where(seq == before, reads, 0.0)
            carry = tl.where(before == last, carry, 0.0)
        if KEEP:
            slot_c = (row * n_chunks + c) * n_heads + head
            state = tl.load(states_ptr + slot_c * P * N + tile)
            tl.store(grads_ptr + slot_c * P * N + tile, grad.to(grads_ptr.dtype.element_ty))
            tl.store(passed_ptr + slot_c, carry * tl.sum(tl.sum(state.to(tl.float32) * grad, 1), 0))
            seen = tl.dot(C.to(state.dtype), tl.trans(state), input_precision=PRECISION)  # [t, p]
            tl.store(reader_ptr + steps + tokens, tl.sum(dy.to(tl.float32) * seen, 1) * reads)
        read = (dy.to(tl.float32) * reads[:, None]).to(dy.dtype)
        grad = tl.dot(tl.trans(read), C, grad * carry, input_precision=PRECISION)
    tl.store(initial_ptr + slot + tile, grad)


@triton.jit
def _scores_kernel(B_ptr, C_ptr, seq_ptr, scores_ptr, length, n_groups, B_b, B_l, B_g, C_b, C_l, C_g,
                   CHUNK: tl.constexpr, N: tl.constexpr, HAS_SEQ: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """scores [b, chunks, g, s, t] float32 = B_s . C_t where t may see s, else 0.

    A kernel of its own, because all heads of a group share it.
    """
    c, row, group = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    offs_q, offs_n = tl.arange(0, CHUNK), tl.arange(0, N)
    tokens = c * CHUNK + offs_q
    inside = (tokens < length)[:, None]
    B = tl.load(B_ptr + row * B_b + group * B_g + tokens[:, None] * B_l + offs_n[None, :], mask=inside, other=0.0)
    C = tl.load(C_ptr + row * C_b + group * C_g + tokens[:, None] * C_l + offs_n[None, :], mask=inside, other=0.0)
    visible = offs_q[:, None] <= offs_q[None, :]
    if HAS_SEQ:
        seq = tl.load(seq_ptr + row * length + tokens, mask=tokens < length, other=-1)
        visible = visible & (seq[:, None] == seq[None, :])
    scores = tl.where(visible, tl.dot(B, tl.trans(C), input_precision=PRECISION), 0.0)
    at = ((row * tl.num_programs(0) + c) * n_groups + group) * CHUNK * CHUNK
    tl.store(scores_ptr + at + offs_q[:, None] * CHUNK + offs_q[None, :], scores)


@triton.jit
def _token_kernel(x_ptr, dy_ptr, dt_ptr, cum_ptr, A_ptr, B_ptr, D_ptr, seq_ptr, scores_ptr, grads_ptr, reader_ptr, passed_ptr,
                  dx_ptr, ddt_ptr, dscores_ptr, sums_ptr,
                  length, padded, n_chunks, n_heads, n_groups, heads_per_group, heads_per_split,
                  x_b, x_l, x_h, dy_b, dy_l, dy_h, B_b, B_l, B_g, dx_b, dx_l, dx_h, ddt_b, ddt_l, ddt_h,
                  CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, HAS_D: tl.constexpr,
                  HAS_SEQ: tl.constexpr, SOFTPLUS: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dx, ddt and the scalars of one chunk, for heads_per_split heads of a group; also the gradient of the scores.

    Tiles of pairs are held as [s, t], sources down, so that dx = pairs @ dy takes them straight from registers.
    sums: [3, b * chunks, h], this chunk's part of the gradients of A, D and dt's bias.
    """
    c, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group, split = tl.program_id(2) // SPLITS, tl.program_id(2) % SPLITS
    offs_q, offs_p, offs_n = tl.arange(0, CHUNK), tl.arange(0, P), tl.arange(0, N)
    first = c * CHUNK
    tokens = first + offs_q
    inside = (tokens < length)[:, None]
    tile = offs_p[:, None] * N + offs_n[None, :]
    B = tl.load(B_ptr + row * B_b + group * B_g + tokens[:, None] * B_l + offs_n[None, :], mask=inside, other=0.0)
    pair = offs_q[:, None] * CHUNK + offs_q[None, :]
    at_scores = ((row * n_chunks + c) * n_groups + group) * CHUNK * CHUNK
    scores = tl.load(scores_ptr + at_scores + pair)  # [s, t], 0 where t must not see s
    if HAS_SEQ:
        seq, _, last = _documents(seq_ptr, row, tokens, first, length, CHUNK)
    dscores = tl.zeros([CHUNK, CHUNK], tl.float32)
    head0 = group * heads_per_group + split * heads_per_split
    for head in tl.range(head0, head0 + heads_per_split):
        x = tl.load(x_ptr + row * x_b + head * x_h + tokens[:, None] * x_l + offs_p[None, :], mask=inside, other=0.0)
        dy = tl.load(dy_ptr + row * dy_b + head * dy_h + tokens[:, None] * dy_l + offs_p[None, :], mask=inside,
                     other=0.0)  # fmt: skip
        where = (row * n_chunks + c) * n_heads + head
        grad = tl.load(grads_ptr + where * P * N + tile)
        steps = (row * n_heads + head) * padded
        dt = tl.load(dt_ptr + steps + tokens)
        cum = tl.load(cum_ptr + steps + tokens)
        end = tl.load(cum_ptr + steps + first + CHUNK - 1)
        A = tl.load(A_ptr + head)
        feed = tl.exp2(end - cum)  # times dt: what a token adds to the state that leaves
        if HAS_SEQ:
            feed = tl.where(seq == last, feed, 0.0)

        # pairs inside the chunk; the minimum keeps pairs that do not count (their scores are 0) finite
        decay = tl.exp2(tl.minimum(cum[None, :] - cum[:, None], 0.0))  # [s, t]
        meet = tl.dot(x, tl.trans(dy), input_precision=PRECISION) * decay  # x_s . dy_t, decayed
        dscores += meet * dt[:, None]
        meet *= scores
        source = tl.sum(meet, 1)  # [s], without dt_s
        reader = tl.load(reader_ptr + steps + tokens) + tl.sum(meet * dt[:, None], 0)  # [t]
        direct = tl.dot((scores * decay).to(dy.dtype), dy, input_precision=PRECISION)  # [s, p], without dt_s

        # feeding the state that leaves the chunk
        wanted = tl.dot(B.to(grad.dtype), tl.trans(grad), input_precision=PRECISION)  # [s, p]
        fed = tl.sum(x.to(tl.float32) * wanted, 1) * feed
        # the product with dt comes first, so that the compiler does not chain `wanted` into `direct`
        dx = direct * dt[:, None] + wanted * (feed * dt)[:, None]

        # the running sum: + as reader, - as source, and its last value decays everything that leaves
        dcum = reader - (source + fed) * dt
        dcum += tl.where(offs_q == CHUNK - 1, tl.load(passed_ptr + where) + tl.sum(fed * dt, 0), 0.0)
        da = tl.cumsum(dcum, 0, reverse=True)
        ddt = source + fed + da * A
        if SOFTPLUS:
            ddt = ddt * (1 - tl.exp(-dt))  # the derivative of softplus, from its value
        total = tl.num_programs(0) * tl.num_programs(1) * n_heads
        tl.store(sums_ptr + where, tl.sum(da * dt, 0))
        tl.store(sums_ptr + 2 * total + where, tl.sum(ddt, 0))
        if HAS_D:
            dx += tl.load(D_ptr + head).to(tl.float32) * dy.to(tl.float32)
            tl.store(sums_ptr + total + where, tl.sum(tl.sum(x.to(tl.float32) * dy.to(tl.float32), 1), 0))
        tl.store(dx_ptr + row * dx_b + head * dx_h + tokens[:, None] * dx_l + offs_p[None, :],
                 dx.to(dx_ptr.dtype.element_ty), mask=inside)  # fmt: skip
        tl.store(ddt_ptr + row * ddt_b + head * ddt_h + tokens.to(tl.int64) * ddt_l,
                 ddt.to(ddt_ptr.dtype.element_ty), mask=tokens < length)  # fmt: skip
    slot = split * tl.num_programs(1).to(tl.int64) * n_chunks * n_groups * CHUNK * CHUNK
    tl.store(dscores_ptr + slot + at_scores + pair, dscores)


@triton.jit
def _group_kernel(x_ptr, dy_ptr, dt_ptr, cum_ptr, B_ptr, C_ptr, seq_ptr, dscores_ptr, states_ptr, grads_ptr, dB_ptr, dC_ptr,
                  length, padded, n_chunks, n_heads, n_groups, heads_per_group, heads_per_split,
                  x_b, x_l, x_h, dy_b, dy_l, dy_h, B_b, B_l, B_g, C_b, C_l, C_g,
                  CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, HAS_SEQ: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """dB and dC of one chunk and group: sums over heads that stay in registers. Same splits as `_token_kernel`."""
    c, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group, split = tl.program_id(2) // SPLITS, tl.program_id(2) % SPLITS
    offs_q, offs_p, offs_n = tl.arange(0, CHUNK), tl.arange(0, P), tl.arange(0, N)
    first = c * CHUNK
    tokens = first + offs_q
    inside = (tokens < length)[:, None]
    tile = offs_p[:, None] * N + offs_n[None, :]
    if HAS_SEQ:
        seq, before, last = _documents(seq_ptr, row, tokens, first, length, CHUNK)
    dB = tl.zeros([CHUNK, N], tl.float32)
    dC = tl.zeros([CHUNK, N], tl.float32)
    head0 = group * heads_per_group + split * heads_per_split
    for head in tl.range(head0, head0 + heads_per_split):
        x = tl.load(x_ptr + row * x_b + head * x_h + tokens[:, None] * x_l + offs_p[None, :], mask=inside, other=0.0)
        dy = tl.load(dy_ptr + row * dy_b + head * dy_h + tokens[:, None] * dy_l + offs_p[None, :], mask=inside,
                     other=0.0)  # fmt: skip
        at = ((row * n_chunks + c) * n_heads + head) * P * N + tile
        state = tl.load(states_ptr + at)
        grad = tl.load(grads_ptr + at)
        steps = (row * n_heads + head) * padded
        cum = tl.load(cum_ptr + steps + tokens)
        reads = tl.exp2(cum)
        feed = tl.exp2(tl.load(cum_ptr + steps + first + CHUNK - 1) - cum) * tl.load(dt_ptr + steps + tokens)
        if HAS_SEQ:
            reads = tl.where(seq == before, reads, 0.0)
            feed = tl.where(seq == last, feed, 0.0)
        read = (dy.to(tl.float32) * reads[:, None]).to(state.dtype)
        dC = tl.dot(read, state, dC, input_precision=PRECISION)
        fed = (x.to(tl.float32) * feed[:, None]).to(grad.dtype)
        dB = tl.dot(fed, grad, dB, input_precision=PRECISION)
    slot = split * tl.num_programs(1).to(tl.int64) * n_chunks * n_groups * CHUNK * CHUNK
    at_scores = ((row * n_chunks + c) * n_groups + group) * CHUNK * CHUNK
    pair = offs_q[:, None] * CHUNK + offs_q[None, :]
    visible = offs_q[:, None] <= offs_q[None, :]
    if HAS_SEQ:
        visible = visible & (seq[:, None] == seq[None, :])
    pairs = tl.where(visible, tl.load(dscores_ptr + slot + at_scores + pair), 0.0).to(B_ptr.dtype.element_ty)
    B = tl.load(B_ptr + row * B_b + group * B_g + tokens[:, None] * B_l + offs_n[None, :], mask=inside, other=0.0)
    C = tl.load(C_ptr + row * C_b + group * C_g + tokens[:, None] * C_l + offs_n[None, :], mask=inside, other=0.0)
    dB = tl.dot(pairs, C, dB, input_precision=PRECISION)
    dC = tl.dot(tl.trans(pairs), B, dC, input_precision=PRECISION)
    rows = tl.num_programs(1).to(tl.int64) * length
    out = ((split * rows + row * length + tokens)[:, None] * n_groups + group) * N + offs_n[None, :]
    tl.store(dB_ptr + out, dB, mask=inside)
    tl.store(dC_ptr + out, dC, mask=inside)


def launch_options(kernel: str, dtype: torch.dtype) -> dict[str, int]:
    """num_warps and num_stages, measured on an H100 (docs/lab-notes.md)."""
    if dtype == torch.float32:
        return {"num_warps": 8, "num_stages": 1}
    return {
        "scan": {"num_warps": 4, "num_stages": 1},
        "reverse": {"num_warps": 4, "num_stages": 3},
        "token": {"num_warps": 8, "num_stages": 3},
        "group": {"num_warps": 8, "num_stages": 3},
    }[kernel]


def head_splits(b: int, n_chunks: int, groups: int, heads_per_group: int) -> int:
    """How many programs share the heads of one chunk and group: enough to fill the GPU, few enough to add up cheaply."""
    splits = 1
    while splits < 4 and heads_per_group % (2 * splits) == 0 and b * n_chunks * groups * splits < 4 * PROGRAMS:
        splits *= 2
    return splits


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """States kept for backward are bfloat16 in half precision: float16's range is too small for their gradients."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def _precision(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _tl(dtype: torch.dtype):
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def segments(b: int, heads: int, n_chunks: int) -> tuple[int, int]:
    """(segments, chunks per segment): more than one segment only where rows x heads leave the GPU half empty."""
    wanted = max(1, min(PROGRAMS // max(1, b * heads), n_chunks // 8))
    per_segment = -(-n_chunks // wanted)
    return -(-n_chunks // per_segment), per_segment


def prepare_decay(dt: torch.Tensor, bias: torch.Tensor | None, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dt [b, l, h] (raw, with bias, then softplus; or final, bias None) -> dt and cum [b, h, padded l] float32."""
    b, l, h = dt.shape
    n_chunks = triton.cdiv(l, CHUNK)
    out, cum = torch.empty((2, b, h, n_chunks * CHUNK), dtype=torch.float32, device=dt.device)
    block = min(16, triton.next_power_of_2(h))
    _decay_kernel[(n_chunks, b, triton.cdiv(h, block))](
        dt, A if bias is None else bias, A, out, cum, l, n_chunks * CHUNK, h, *dt.stride(), SOFTPLUS=bias is not None,
        CHUNK=CHUNK, HEADS=block, LOG2E=LOG2E, num_warps=4,
    )  # fmt: skip
    return out, cum


def _segment_decay(cum: torch.Tensor, seq_idx: torch.Tensor | None, length: int, count: int, per_segment: int):
    """[b, segments, h, 1, 1]: how much of the state that enters a segment is left when it ends."""
    b, h, padded = cum.shape
    ends = cum[..., CHUNK - 1 :: CHUNK]  # [b, h, chunks]
    ends = torch.nn.functional.pad(ends, (0, count * per_segment - ends.shape[-1]))
    left = ends.view(b, h, count, per_segment).sum(-1).exp2().transpose(1, 2)  # [b, segments, h]
    if seq_idx is not None:
        first = torch.arange(count, device=cum.device) * (per_segment * CHUNK)
        last = (first + per_segment * CHUNK).clamp(max=length) - 1
        same = seq_idx[:, (first - 1).clamp(min=0)] == seq_idx[:, last]
        left = left * same[..., None]
    return left[..., None, None]


def scan_forward(x, dt, cum, B, C, D, seq_idx, initial_state, *, keep: bool):
    """The forward pass on prepared decays.

    Args:
        x: [b, l, h, p], B, C: [b, l, g, n], last dimension contiguous; dt, cum: from `prepare_decay`.

    Returns:
        y [b, l, h, p] contiguous; states [b, chunks, h, p, n] that enter the chunks (empty unless keep); the state
        after the last token [b, h, p, n] float32.
    """
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    n_chunks = cum.shape[-1] // CHUNK
    count, per_segment = segments(b, h, n_chunks)
    y = torch.empty((b, l, h, p), dtype=x.dtype, device=x.device)
    wide = state_dtype(x.dtype)
    states = torch.empty((b, n_chunks, h, p, n) if keep else (0,), dtype=wide, device=x.device)

    def launch(init: torch.Tensor | None, output: bool) -> torch.Tensor:
        final = torch.empty((b, count, h, p, n), dtype=torch.float32, device=x.device)
        _scan_kernel[(h, b * count)](
            x, dt, cum, B, C, D if D is not None else dt, seq_idx if seq_idx is not None else dt,
            init if init is not None else dt, y, states, final, l, cum.shape[-1], n_chunks, per_segment, count, h,
            h // g, *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *y.stride()[:3], CHUNK=CHUNK, P=p, N=n,
            HAS_D=D is not None, HAS_SEQ=seq_idx is not None, HAS_INIT=init is not None, OUTPUT=output,
            KEEP=keep and output, STATE=_tl(wide), PRECISION=_precision(x.dtype), **launch_options("scan", x.dtype),
        )  # fmt: skip
        return final

    entering = initial_state[:, None] if initial_state is not None else None
    if count > 1:
        added = launch(None, output=False)
        left = _segment_decay(cum, seq_idx, l, count, per_segment)
        state = initial_state.float() if initial_state is not None else torch.zeros_like(added[:, 0])
        entering = torch.empty_like(added)
        for i in range(count):
            entering[:, i] = state
            state = left[:, i] * state + added[:, i]
    final = launch(entering.contiguous() if entering is not None else None, output=True)
    return y, states, final[:, -1].contiguous()


def scan_backward(dy, x, dt, cum, A, B, C, D, seq_idx, states, dfinal, *, dx, ddt, softplus: bool):
    """The backward pass. dx [b, l, h, p] and ddt [b, l, h] are written in place (any strides, dx's last one 1).

    Args:
        dfinal: gradient of the last state [b, h, p, n] float32, or None.
        softplus: ddt is the gradient of raw dt (before bias and softplus) instead of dt's.

    Returns:
        dA [h], dB and dC [b, l, g, n] float32, dD [h], dbias [h], dinitial [b, h, p, n], all float32.
    """
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    n_chunks = cum.shape[-1] // CHUNK
    count, per_segment = segments(b, h, n_chunks)
    grads = torch.empty_like(states)
    reader = torch.empty_like(cum)
    passed = torch.empty((b, n_chunks, h), dtype=torch.float32, device=x.device)
    seq = seq_idx if seq_idx is not None else dt
    precision = _precision(x.dtype)

    def launch(final: torch.Tensor | None, keep: bool) -> torch.Tensor:
        initial = torch.empty((b, count, h, p, n), dtype=torch.float32, device=x.device)
        _reverse_kernel[(h, b * count)](
            dy, cum, C, seq, final if final is not None else dt, states, grads, reader, passed, initial, l, cum.shape[-1], n_chunks,
            per_segment, count, h, h // g, *dy.stride()[:3], *C.stride()[:3], CHUNK=CHUNK, P=p, N=n,
            HAS_SEQ=seq_idx is not None, HAS_FINAL=final is not None, KEEP=keep, PRECISION=precision,
            **launch_options("reverse", x.dtype),
        )  # fmt: skip
        return initial

    leaving = dfinal[:, None] if dfinal is not None else None
    if count > 1:
        added = launch(None, keep=False)
        left = _segment_decay(cum, seq_idx, l, count, per_segment)
        grad = dfinal.float() if dfinal is not None else torch.zeros_like(added[:, 0])
        leaving = torch.empty_like(added)
        for i in reversed(range(count)):
            leaving[:, i] = grad
            grad = left[:, i] * grad + added[:, i]
    dinitial = launch(leaving.contiguous() if leaving is not None else None, keep=True)[:, 0].contiguous()

    splits = head_splits(b, n_chunks, g, h // g)
    dB, dC = torch.empty((2, splits, b, l, g, n), dtype=torch.float32, device=x.device)
    sums = torch.empty((3, b * n_chunks, h), dtype=torch.float32, device=x.device)
    scores = torch.empty((b, n_chunks, g, CHUNK, CHUNK), dtype=torch.float32, device=x.device)
    _scores_kernel[(n_chunks, b, g)](
        B, C, seq, scores, l, g, *B.stride()[:3], *C.stride()[:3], CHUNK=CHUNK, N=n, HAS_SEQ=seq_idx is not None,
        PRECISION=precision, num_warps=4,
    )  # fmt: skip
    dscores = torch.empty((splits, *scores.shape), dtype=torch.float32, device=x.device)
    sizes = (l, cum.shape[-1], n_chunks, h, g, h // g, h // g // splits)
    strides = (*x.stride()[:3], *dy.stride()[:3], *B.stride()[:3], *C.stride()[:3])
    shapes = {"CHUNK": CHUNK, "P": p, "N": n, "SPLITS": splits, "HAS_SEQ": seq_idx is not None, "PRECISION": precision}
    _token_kernel[(n_chunks, b, g * splits)](
        x, dy, dt, cum, A, B, D if D is not None else dt, seq, scores, grads, reader, passed, dx, ddt, dscores, sums,
        *sizes, *strides[:9], *dx.stride()[:3], *ddt.stride(), HAS_D=D is not None, SOFTPLUS=softplus, **shapes,
        **launch_options("token", x.dtype),
    )  # fmt: skip
    _group_kernel[(n_chunks, b, g * splits)](
        x, dy, dt, cum, B, C, seq, dscores, states, grads, dB, dC, *sizes, *strides, **shapes,
        **launch_options("group", x.dtype),
    )  # fmt: skip
    dA, dD, dbias = sums.sum(1)
    return dA, dB, dC, dD, dbias, dinitial


@torch.library.custom_op("megatron_taipan::ssd_forward", mutates_args=())
def _forward_op(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None,
    seq_idx: torch.Tensor | None, initial_state: torch.Tensor | None, keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(y, final state, states that enter the chunks)."""
    y, states, final = scan_forward(x, *prepare_decay(dt, None, A), B, C, D, seq_idx, initial_state, keep=keep)
    return y, final, states


@_forward_op.register_fake
def _(x, dt, A, B, C, D, seq_idx, initial_state, keep):
    b, l, h, p = x.shape
    n = B.shape[-1]
    states = (b, -(-l // CHUNK), h, p, n) if keep else (0,)
    return x.new_empty(x.shape), x.new_empty((b, h, p, n), dtype=torch.float32), x.new_empty(states, dtype=state_dtype(x.dtype))  # fmt: skip


@torch.library.custom_op("megatron_taipan::ssd_backward", mutates_args=())
def _backward_op(
    dy: torch.Tensor, dfinal: torch.Tensor | None, x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor,
    B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None, seq_idx: torch.Tensor | None, states: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dx, ddt, dA, dB, dC, dD, dinitial)."""
    steps, cum = prepare_decay(dt, None, A)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ddt = torch.empty(dt.shape, dtype=torch.float32, device=x.device)
    dA, dB, dC, dD, _, dinitial = scan_backward(
        dy, x, steps, cum, A, B, C, D, seq_idx, states, dfinal, dx=dx, ddt=ddt, softplus=False
    )
    return dx, ddt.to(dt.dtype), dA, dB.sum(0).to(B.dtype), dC.sum(0).to(C.dtype), dD.clone(), dinitial


@_backward_op.register_fake
def _(dy, dfinal, x, dt, A, B, C, D, seq_idx, states):
    b, _, h, p = x.shape
    state = x.new_empty((b, h, p, B.shape[-1]), dtype=torch.float32)
    new = torch.Tensor.new_empty
    return new(x, x.shape), new(dt, dt.shape), new(A, A.shape), new(B, B.shape), new(C, C.shape), new(A, A.shape), state


def _save(ctx, inputs, output):
    x, dt, A, B, C, D, seq_idx, initial_state, _keep = inputs
    ctx.save_for_backward(x, dt, A, B, C, D, seq_idx, initial_state, output[2])


def _backward(ctx, dy, dfinal, _dstates):
    x, dt, A, B, C, D, seq_idx, initial_state, states = ctx.saved_tensors
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    dx, ddt, dA, dB, dC, dD, dinitial = _backward_op(dy, dfinal, x, dt, A, B, C, D, seq_idx, states)
    dinitial = dinitial.to(initial_state.dtype) if initial_state is not None else None
    return dx, ddt, dA, dB, dC, dD.to(D.dtype) if D is not None else None, None, dinitial, None


_forward_op.register_autograd(_backward, setup_context=_save)


def supports(p: int, n: int) -> bool:
    """Whether the kernels take this head size and state size: powers of two from 16 to 128."""
    return all(16 <= size <= 128 and size & (size - 1) == 0 for size in (p, n))


def ssd(x, dt, A, B, C, *, chunk_size, D=None, seq_idx=None, initial_state=None, return_state=False):
    """The scan; arguments and results as `megatron_taipan.ops.ssd.ssd_reference`.

    chunk_size is the reference's; these kernels always work on `CHUNK` tokens, which changes speed, not results.
    """
    x, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, B, C))
    seq_idx = seq_idx.int().contiguous() if seq_idx is not None else None
    initial_state = initial_state.contiguous() if initial_state is not None else None
    keep = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, dt, A, B, C, D, initial_state)
    )
    y, final, _ = _forward_op(x, dt, A.float().contiguous(), B, C, D, seq_idx, initial_state, keep)
    return (y, final) if return_state else y
