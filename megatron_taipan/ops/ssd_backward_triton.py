"""The backward kernels of the SSD scan; `ssd_triton` describes how they work together."""

import torch
import triton
import triton.language as tl

from megatron_taipan.ops.column_sums_triton import column_sums
from megatron_taipan.ops.ssd_forward_triton import (
    PROGRAMS,
    Decays,
    launch_options,
    precision_of,
    segment_decay,
    segments,
)
from megatron_taipan.ops.ssd_tiles import (
    CHUNK,
    load_state,
    load_tokens,
    of_states,
    of_tokens,
    place_type,
    shared_memory,
    store_tokens,
    tiled,
)


@triton.jit
def _reverse_kernel(dy, cum_ptr, starts_ptr, C, final_ptr, grads_ptr, initial_ptr,
                    length, padded, n_chunks, per_segment, n_segments, n_heads, heads_per_group,
                    dy_b, dy_l, dy_h, C_b, C_l, C_g,
                    CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HAS_SEQ: tl.constexpr,
                    HAS_FINAL: tl.constexpr, KEEP: tl.constexpr, TURNED: tl.constexpr, PLACE: tl.constexpr,
                    TILED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """From the end of a segment to its start: the gradient of the state that leaves each chunk (KEEP), then enters.

    TURNED: a program holds it as [n, p], so that its product takes C and dy from shared memory as they were loaded.
    """
    head = tl.program_id(0)
    row, segment = tl.program_id(1) // n_segments, tl.program_id(1) % n_segments
    group = head // heads_per_group
    offs_q, offs_p, offs_n = tl.arange(0, CHUNK), tl.arange(0, P), tl.arange(0, N)
    if TURNED:
        tile = offs_p[None, :] * N + offs_n[:, None]
        grad = tl.zeros([N, P], tl.float32)
    else:
        tile = offs_p[:, None] * N + offs_n[None, :]
        grad = tl.zeros([P, N], tl.float32)
    row_wide = row.to(tl.int64)
    slot = ((row_wide * n_segments + segment) * n_heads + head) * P * N
    if HAS_FINAL:
        grad = tl.load(final_ptr + slot + tile).to(tl.float32)
    cum_row, starts_row = cum_ptr + (row_wide * n_heads + head) * padded, starts_ptr + row_wide * padded
    begin = segment * per_segment
    count = tl.minimum(begin + per_segment, n_chunks) - begin
    for i in tl.range(0, count, num_stages=STAGES):
        c = begin + count - 1 - i
        first = c * CHUNK
        dy_c = load_tokens(dy, row, first, head * dy_h, dy_b, dy_l, length, CHUNK, P, PLACE, TILED)
        C_c = load_tokens(C, row, first, group * C_g, C_b, C_l, length, CHUNK, N, PLACE, TILED)
        carry = tl.exp2(tl.load(cum_row + first + CHUNK - 1))
        reads = tl.exp2(tl.load(cum_row + first + offs_q))
        if HAS_SEQ:
            reads = tl.where(tl.load(starts_row + first + offs_q) < 0, reads, 0.0)
            carry = tl.where(tl.load(starts_row + first + CHUNK - 1) < 0, carry, 0.0)
        if KEEP:
            slot_c = ((row_wide * n_chunks + c) * n_heads + head) * P * N
            tl.store(grads_ptr + slot_c + tile, grad.to(grads_ptr.dtype.element_ty))
        read = (dy_c.to(tl.float32) * reads[:, None]).to(dy_c.dtype)
        if TURNED:
            grad = tl.dot(tl.trans(C_c), read, grad * carry, input_precision=PRECISION)
        else:
            grad = tl.dot(tl.trans(read), C_c, grad * carry, input_precision=PRECISION)
    tl.store(initial_ptr + slot + tile, grad)


@triton.jit
def _token_kernel(x, dy, dt_ptr, cum_ptr, starts_ptr, B, C, D_ptr, grads, dx, parts_ptr, dscores_ptr,
                  length, padded, n_chunks, n_heads, n_groups, heads_per_group, heads_per_split,
                  x_b, x_l, x_h, dy_b, dy_l, dy_h, B_b, B_l, B_g, C_b, C_l, C_g, dx_b, dx_l, dx_h,
                  CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, HAS_D: tl.constexpr,
                  HAS_SEQ: tl.constexpr, PLACE: tl.constexpr, TILED: tl.constexpr, PRECISION: tl.constexpr,
                  STAGES: tl.constexpr):  # fmt: skip
    """dx of one chunk, for heads_per_split heads of a group; also the gradient of the scores, added up over them.

    Tiles of pairs are stored as [s, t], sources down, so that dx = pairs @ dy takes them straight from registers. What
    the gradients of the decays need of every token goes to parts [5, b, h, padded] float32: 0 what it read and 1, without
    dt, what it gave within the chunk; 2, without dt, what it fed to the state that leaves; 3 x . dy. `_group_kernel`
    writes 4, what it read from the state that entered.

    B, C and dx do not go through the copy engine: the first two are read once, and with the last it was slower.
    """
    c, row = tl.program_id(0), tl.program_id(1)
    group, split = tl.program_id(2) // SPLITS, tl.program_id(2) % SPLITS
    offs_q = tl.arange(0, CHUNK)
    first = c * CHUNK
    B_c = load_tokens(B, row, first, group * B_g, B_b, B_l, length, CHUNK, N, PLACE, False)
    C_c = load_tokens(C, row, first, group * C_g, C_b, C_l, length, CHUNK, N, PLACE, False)
    visible = offs_q[:, None] <= offs_q[None, :]
    if HAS_SEQ:
        starts_row = starts_ptr + row.to(tl.int64) * padded + first
        visible = visible & (offs_q[:, None] >= tl.load(starts_row + offs_q)[None, :])
        last = tl.load(starts_row + CHUNK - 1)
    scores = tl.where(visible, tl.dot(B_c, tl.trans(C_c), input_precision=PRECISION), 0.0)  # [s, t]
    itself = offs_q[:, None] == offs_q[None, :]
    dscores = tl.zeros([CHUNK, CHUNK], tl.float32)
    part = tl.num_programs(1).to(tl.int64) * n_heads * padded
    head0 = group * heads_per_group + split * heads_per_split
    for head in tl.range(head0, head0 + heads_per_split, num_stages=STAGES):
        x_c = load_tokens(x, row, first, head * x_h, x_b, x_l, length, CHUNK, P, PLACE, TILED)
        dy_c = load_tokens(dy, row, first, head * dy_h, dy_b, dy_l, length, CHUNK, P, PLACE, TILED)
        grad = load_state(grads, (row * n_chunks + c) * n_heads + head, P, N, TILED)
        steps = (row.to(tl.int64) * n_heads + head) * padded + first
        dt = tl.load(dt_ptr + steps + offs_q)
        cum = tl.load(cum_ptr + steps + offs_q)
        end = tl.load(cum_ptr + steps + CHUNK - 1)
        D = 0.0
        if HAS_D:
            D = tl.load(D_ptr + head).to(tl.float32)
        out = parts_ptr + steps + offs_q

        # pairs inside the chunk; the minimum keeps pairs that do not count (their scores are 0) finite
        decay = tl.exp2(tl.minimum(cum[None, :] - cum[:, None], 0.0))  # [s, t]
        weights = scores * decay * dt[:, None] + tl.where(itself, D, 0.0)  # of dy_t in dx_s
        weights = weights.to(dy_c.dtype)
        meet = tl.dot(x_c, tl.trans(dy_c), input_precision=PRECISION) * decay  # x_s . dy_t, decayed
        dscores += meet * dt[:, None]
        if HAS_D:
            tl.store(out + 3 * part, tl.sum(tl.where(itself, meet, 0.0), 1))  # x . dy: decay is 1 there
        meet *= scores
        tl.store(out + part, tl.sum(meet, 1))
        tl.store(out, tl.sum(meet * dt[:, None], 0))

        # feeding the state that leaves the chunk
        feed = tl.exp2(end - cum)
        if HAS_SEQ:
            feed = tl.where(offs_q >= last, feed, 0.0)
        wanted = tl.dot(B_c.to(grad.dtype), tl.trans(grad), input_precision=PRECISION) * feed[:, None]  # [s, p]
        tl.store(out + 2 * part, tl.sum(x_c.to(tl.float32) * wanted, 1))
        dx_c = tl.dot(weights, dy_c, wanted * dt[:, None], input_precision=PRECISION)
        store_tokens(dx, dx_c, row, first, head * dx_h, dx_b, dx_l, length, CHUNK, P, PLACE, False)
    slot = split * tl.num_programs(1).to(tl.int64) * n_chunks * n_groups * CHUNK * CHUNK
    at_scores = ((row.to(tl.int64) * n_chunks + c) * n_groups + group) * CHUNK * CHUNK
    tl.store(dscores_ptr + slot + at_scores + offs_q[:, None] * CHUNK + offs_q[None, :], dscores)


@triton.jit
def _steps_kernel(dt_ptr, A_ptr, parts_ptr, passed_ptr, ddt_ptr, sums_ptr, length, padded, n_heads,
                  ddt_b, ddt_l, ddt_h, HAS_D: tl.constexpr, SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr,
                  HEADS: tl.constexpr):  # fmt: skip
    """ddt of one chunk and HEADS heads from what the token and the group kernel left of each token.

    sums: [3, b * chunks, h], this chunk's part of the gradients of A, D and dt's bias.
    """
    c, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs_q = tl.arange(0, CHUNK)
    tokens = c * CHUNK + offs_q
    heads = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    real = heads < n_heads
    at = (row * n_heads + heads)[None, :] * padded + tokens[:, None]
    mask = real[None, :] & (tokens < padded)[:, None]
    part = tl.num_programs(1).to(tl.int64) * n_heads * padded
    dt = tl.load(dt_ptr + at, mask=mask, other=0.0)
    reader = tl.load(parts_ptr + at, mask=mask, other=0.0) + tl.load(parts_ptr + 4 * part + at, mask=mask, other=0.0)
    source = tl.load(parts_ptr + part + at, mask=mask, other=0.0)
    fed = tl.load(parts_ptr + 2 * part + at, mask=mask, other=0.0)
    A = tl.load(A_ptr + heads, mask=real, other=0.0)
    where = (row * tl.num_programs(0) + c) * n_heads + heads
    total = tl.num_programs(0) * tl.num_programs(1) * n_heads
    # the running sum: + as reader, - as source, and its last value decays everything that leaves
    leaving = tl.load(passed_ptr + where, mask=real, other=0.0) + tl.sum(fed * dt, 0)
    dcum = reader - (source + fed) * dt + tl.where(offs_q[:, None] == CHUNK - 1, leaving[None, :], 0.0)
    da = tl.cumsum(dcum, 0, reverse=True)
    ddt = source + fed + da * A[None, :]
    if SOFTPLUS:
        ddt = ddt * (1 - tl.exp(-dt))  # the derivative of softplus, from its value
    tl.store(sums_ptr + where, tl.sum(da * dt, 0), mask=real)
    tl.store(sums_ptr + 2 * total + where, tl.sum(ddt, 0), mask=real)
    if HAS_D:
        xdy = tl.load(parts_ptr + 3 * part + at, mask=mask, other=0.0)
        tl.store(sums_ptr + total + where, tl.sum(xdy, 0), mask=real)
    tl.store(ddt_ptr + row * ddt_b + tokens.to(tl.int64)[:, None] * ddt_l + heads[None, :] * ddt_h,
             ddt.to(ddt_ptr.dtype.element_ty), mask=real[None, :] & (tokens < length)[:, None])  # fmt: skip


@triton.jit
def _group_kernel(x, dy, dt_ptr, cum_ptr, starts_ptr, B, C, dscores_ptr, states, grads, parts_ptr, passed_ptr, dB, dC,
                  length, padded, n_chunks, n_heads, n_groups, heads_per_group, heads_per_split,
                  x_b, x_l, x_h, dy_b, dy_l, dy_h, B_b, B_l, B_g, C_b, C_l, C_g, dB_s, dB_b, dB_l, dB_g, dC_s, dC_b, dC_l, dC_g,
                  CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, HAS_SEQ: tl.constexpr,
                  PLACE: tl.constexpr, TILED: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """dB and dC of one chunk and group: sums over heads that stay in registers. Same splits as `_token_kernel`.

    Since it has both states, it also computes their contribution to the gradients of the decays: parts[4], each token's
    y . dy as far as it read the entering state, which is C . dC of this head; and passed [b, chunks, h], the product of
    the entering state and its gradient through the chunk.

    The numbers of the next head are loaded one iteration ahead: with so many tiles under way it is faster so.
    """
    c, row = tl.program_id(0), tl.program_id(1)
    group, split = tl.program_id(2) // SPLITS, tl.program_id(2) % SPLITS
    offs_q = tl.arange(0, CHUNK)
    first = c * CHUNK
    if HAS_SEQ:
        starts_row = starts_ptr + row.to(tl.int64) * padded + first
        starts = tl.load(starts_row + offs_q)
        last = tl.load(starts_row + CHUNK - 1)
    C_c = load_tokens(C, row, first, group * C_g, C_b, C_l, length, CHUNK, N, PLACE, False)
    part = tl.num_programs(1).to(tl.int64) * n_heads * padded
    dB_c = tl.zeros([CHUNK, N], tl.float32)
    dC_c = tl.zeros([CHUNK, N], tl.float32)
    head0 = group * heads_per_group + split * heads_per_split
    steps = (row.to(tl.int64) * n_heads + head0) * padded + first
    dt = tl.load(dt_ptr + steps + offs_q)
    cum = tl.load(cum_ptr + steps + offs_q)
    end = tl.load(cum_ptr + steps + CHUNK - 1)
    for head in tl.range(head0, head0 + heads_per_split, num_stages=STAGES):
        x_c = load_tokens(x, row, first, head * x_h, x_b, x_l, length, CHUNK, P, PLACE, TILED)
        dy_c = load_tokens(dy, row, first, head * dy_h, dy_b, dy_l, length, CHUNK, P, PLACE, TILED)
        where = (row * n_chunks + c) * n_heads + head
        state = load_state(states, where, P, N, TILED)
        grad = load_state(grads, where, P, N, TILED)
        steps = (row.to(tl.int64) * n_heads + head) * padded + first
        ahead = steps + tl.where(head + 1 < head0 + heads_per_split, padded, 0)
        next_dt = tl.load(dt_ptr + ahead + offs_q)
        next_cum = tl.load(cum_ptr + ahead + offs_q)
        next_end = tl.load(cum_ptr + ahead + CHUNK - 1)
        reads = tl.exp2(cum)
        feed = tl.exp2(end - cum) * dt
        carry = tl.exp2(end)
        if HAS_SEQ:
            reads = tl.where(starts < 0, reads, 0.0)
            feed = tl.where(offs_q >= last, feed, 0.0)
            carry = tl.where(last < 0, carry, 0.0)
        read = (dy_c.to(tl.float32) * reads[:, None]).to(state.dtype)
        dC_head = tl.dot(read, state, input_precision=PRECISION)
        dC_c += dC_head
        tl.store(parts_ptr + 4 * part + steps + offs_q, tl.sum(C_c.to(tl.float32) * dC_head, 1))
        tl.store(passed_ptr + where, carry * tl.sum(tl.sum(state.to(tl.float32) * grad.to(tl.float32), 1), 0))
        fed = (x_c.to(tl.float32) * feed[:, None]).to(grad.dtype)
        dB_c = tl.dot(fed, grad, dB_c, input_precision=PRECISION)
        dt, cum, end = next_dt, next_cum, next_end
    slot = split * tl.num_programs(1).to(tl.int64) * n_chunks * n_groups * CHUNK * CHUNK
    at_scores = ((row.to(tl.int64) * n_chunks + c) * n_groups + group) * CHUNK * CHUNK
    pair = offs_q[:, None] * CHUNK + offs_q[None, :]
    visible = offs_q[:, None] <= offs_q[None, :]
    if HAS_SEQ:
        visible = visible & (offs_q[:, None] >= starts[None, :])
    B_c = load_tokens(B, row, first, group * B_g, B_b, B_l, length, CHUNK, N, PLACE, False)
    pairs = tl.where(visible, tl.load(dscores_ptr + slot + at_scores + pair), 0.0).to(B_c.dtype)
    dB_c = tl.dot(pairs, C_c, dB_c, input_precision=PRECISION)
    dC_c = tl.dot(tl.trans(pairs), B_c, dC_c, input_precision=PRECISION)
    store_tokens(dB + split * dB_s, dB_c, row, first, group * dB_g, dB_b, dB_l, length, CHUNK, N, tl.int64, False)
    store_tokens(dC + split * dC_s, dC_c, row, first, group * dC_g, dC_b, dC_l, length, CHUNK, N, tl.int64, False)


def turns(dtype: torch.dtype, p: int, n: int) -> bool:
    """Whether `_reverse_kernel` holds its state transposed: faster in half precision, where both sides fill a warpgroup."""
    return dtype != torch.float32 and p >= 64 and n >= 64


def head_splits(b: int, n_chunks: int, groups: int, heads_per_group: int) -> int:
    """How many programs share the heads of one chunk and group: enough to fill the GPU, few enough to add up cheaply."""
    splits = 1
    while splits < 4 and heads_per_group % (2 * splits) == 0 and b * n_chunks * groups * splits < PROGRAMS:
        splits *= 2
    return splits


def scan_backward(dy, x, decays: Decays, A, B, C, D, states, dfinal, *, dx, ddt, dB, dC, softplus: bool, leave=None):
    """The backward pass. Written in place, with any strides but a contiguous last dimension: dx [b, l, h, p], dB and dC
    [b, l, g, n]; and ddt [b, l, h], of any strides.

    Args:
        decays: from `prepare_decay`; states: those that enter the chunks, from `scan_forward` or `scan_states`.
        dfinal: gradient of the last state [b, h, p, n] float32, or None.
        softplus: ddt is the gradient of raw dt (before bias and softplus) instead of dt's.
        leave: where the row's later tokens are elsewhere: gives dfinal from the initial state's gradient as far as it
            comes from dy.

    Returns:
        The gradients of A, D and dt's bias [3, h] and of the initial state [b, h, p, n], all float32.
    """
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    dt, cum, starts = decays
    n_chunks, padded = cum.shape[-1] // CHUNK, cum.shape[-1]
    count, per_segment = segments(b, h, n_chunks)
    grads = torch.empty_like(states)
    parts = torch.empty((5, *cum.shape), dtype=torch.float32, device=x.device)
    passed = torch.empty((b, n_chunks, h), dtype=torch.float32, device=x.device)
    turned, by_engine, room = turns(x.dtype, p, n), tiled(x, dy, B, C), shared_memory(x.device)
    from_tokens, from_chunks = of_tokens(dy, by_engine), of_states(grads, by_engine)
    shared = {
        "CHUNK": CHUNK, "P": p, "N": n, "HAS_SEQ": starts is not None, "PLACE": place_type(l, x, dy, B, C, dx),
        "TILED": by_engine, "PRECISION": precision_of(x.dtype),
    }  # fmt: skip
    documents = starts if starts is not None else cum

    def launch(final: torch.Tensor | None, keep: bool) -> torch.Tensor:
        initial = torch.empty((b, count, h, p, n), dtype=torch.float32, device=x.device)
        _reverse_kernel[(h, b * count)](
            from_tokens, cum, documents, of_tokens(C, by_engine), final if final is not None else cum, grads, initial, l,
            padded, n_chunks, per_segment, count, h, h // g, *dy.stride()[:3], *C.stride()[:3],
            HAS_FINAL=final is not None, KEEP=keep, TURNED=turned, **shared,
            **launch_options("reverse turned" if turned else "reverse", x.dtype, by_engine, p, n, room),
        )  # fmt: skip
        return initial

    leaving = dfinal[:, None] if dfinal is not None else None
    if count > 1 or leave is not None:
        added = launch(None, keep=False)
        left = segment_decay(decays, count, per_segment)
        grad = dfinal.float() if dfinal is not None else torch.zeros_like(added[:, 0])
        leaving = torch.empty_like(added)
        for i in reversed(range(count)):
            leaving[:, i] = grad
            grad = left[:, i] * grad + added[:, i]
        if leave is not None:
            shares = left.flip(1).cumprod(1).flip(1)  # of the gradient after the last segment, before each segment
            after = leave(grad)[:, None]
            leaving[:, -1:] += after
            leaving[:, :-1].addcmul_(shares[:, 1:], after)
    dinitial = launch(leaving.contiguous() if leaving is not None else None, keep=True)[:, 0].contiguous()

    splits = head_splits(b, n_chunks, g, h // g)
    sums = torch.empty((3, b * n_chunks, h), dtype=torch.float32, device=x.device)
    dscores = torch.empty((splits, b, n_chunks, g, CHUNK, CHUNK), dtype=torch.float32, device=x.device)
    sizes = (l, padded, n_chunks, h, g, h // g, h // g // splits)
    strides = (*x.stride()[:3], *dy.stride()[:3], *B.stride()[:3], *C.stride()[:3])
    _token_kernel[(n_chunks, b, g * splits)](
        of_tokens(x, by_engine), from_tokens, dt, cum, documents, B, C, D if D is not None else dt, from_chunks, dx, parts,
        dscores, *sizes, *strides, *dx.stride()[:3], SPLITS=splits, HAS_D=D is not None, **shared,
        **launch_options("token", x.dtype, by_engine, p, n, room),
    )  # fmt: skip
    # one split writes its sums in place; several leave them to be added up
    out_B, out_C = (t[None] if splits == 1 else t.new_empty((splits, *t.shape), dtype=torch.float32) for t in (dB, dC))
    _group_kernel[(n_chunks, b, g * splits)](
        of_tokens(x, by_engine), from_tokens, dt, cum, documents, B, C, dscores, of_states(states, by_engine), from_chunks,
        parts, passed, out_B, out_C, *sizes, *strides, *out_B.stride()[:4], *out_C.stride()[:4], SPLITS=splits,
        **shared, **launch_options("group", x.dtype, by_engine, p, n, room),
    )  # fmt: skip
    block = min(16, triton.next_power_of_2(h))
    _steps_kernel[(n_chunks, b, triton.cdiv(h, block))](
        dt, A, parts, passed, ddt, sums, l, padded, h, *ddt.stride(), HAS_D=D is not None, SOFTPLUS=softplus,
        CHUNK=CHUNK, HEADS=block, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        dB.copy_(out_B.sum(0))
        dC.copy_(out_C.sum(0))
    return column_sums(sums, torch.float32), dinitial
