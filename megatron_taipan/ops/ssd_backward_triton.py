"""The backward kernels of the SSD scan; `ssd_triton` describes how they work together."""

import torch
import triton
import triton.language as tl

from megatron_taipan.ops.ssd_forward_triton import (
    CHUNK,
    PROGRAMS,
    _documents,
    launch_options,
    place_type,
    precision_of,
    segment_decay,
    segments,
)


@triton.jit
def _reverse_kernel(dy_ptr, cum_ptr, C_ptr, seq_ptr, final_ptr, grads_ptr, initial_ptr,
                    length, padded, n_chunks, per_segment, n_segments, n_heads, heads_per_group,
                    dy_b, dy_l, dy_h, C_b, C_l, C_g,
                    CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HAS_SEQ: tl.constexpr,
                    HAS_FINAL: tl.constexpr, KEEP: tl.constexpr, TURNED: tl.constexpr, PLACE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """From the end of a segment to its start: the gradient of the state that leaves each chunk (KEEP), then enters.

    TURNED: it is stored as [n, p], so that its product takes C and dy from shared memory as they were loaded.
    """
    head = tl.program_id(0)
    row = (tl.program_id(1) // n_segments).to(tl.int64)
    segment = tl.program_id(1) % n_segments
    offs_q, offs_p, offs_n = tl.arange(0, CHUNK), tl.arange(0, P), tl.arange(0, N)
    if TURNED:
        tile = offs_p[None, :] * N + offs_n[:, None]
        grad = tl.zeros([N, P], tl.float32)
    else:
        tile = offs_p[:, None] * N + offs_n[None, :]
        grad = tl.zeros([P, N], tl.float32)
    slot = ((row * n_segments + segment) * n_heads + head) * P * N
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
        at = tokens.to(PLACE)
        dy = tl.load(dy_base + at[:, None] * dy_l + offs_p[None, :], mask=inside, other=0.0)
        C = tl.load(C_base + at[:, None] * C_l + offs_n[None, :], mask=inside, other=0.0)
        cum = tl.load(cum_ptr + steps + tokens)
        carry = tl.exp2(tl.load(cum_ptr + steps + first + CHUNK - 1))
        reads = tl.exp2(cum)
        if HAS_SEQ:
            seq, before, last = _documents(seq_ptr, row, tokens, first, length, CHUNK)
            reads = tl.where(seq == before, reads, 0.0)
            carry = tl.where(before == last, carry, 0.0)
        if KEEP:
            slot_c = (row * n_chunks + c) * n_heads + head
            tl.store(grads_ptr + slot_c * P * N + tile, grad.to(grads_ptr.dtype.element_ty))
        read = (dy.to(tl.float32) * reads[:, None]).to(dy.dtype)
        if TURNED:
            grad = tl.dot(tl.trans(C), read, grad * carry, input_precision=PRECISION)
        else:
            grad = tl.dot(tl.trans(read), C, grad * carry, input_precision=PRECISION)
    tl.store(initial_ptr + slot + tile, grad)


@triton.jit
def _token_kernel(x_ptr, dy_ptr, dt_ptr, cum_ptr, B_ptr, C_ptr, D_ptr, seq_ptr, grads_ptr, dx_ptr, parts_ptr, dscores_ptr,
                  length, padded, n_chunks, n_heads, n_groups, heads_per_group, heads_per_split,
                  x_b, x_l, x_h, dy_b, dy_l, dy_h, B_b, B_l, B_g, C_b, C_l, C_g, dx_b, dx_l, dx_h,
                  CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, HAS_D: tl.constexpr,
                  HAS_SEQ: tl.constexpr, PLACE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dx of one chunk, for heads_per_split heads of a group; also the gradient of the scores, added up over them.

    Tiles of pairs are stored as [s, t], sources down, so that dx = pairs @ dy takes them straight from registers. What
    the gradients of the decays need of every token goes to parts [5, b, h, padded] float32: 0 what it read and 1, without
    dt, what it gave within the chunk; 2, without dt, what it fed to the state that leaves; 3 x . dy. `_group_kernel`
    writes 4, what it read from the state that entered.

    The numbers of the next head are loaded one iteration ahead, which the compiler does only for inputs of a product.
    """
    c, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group, split = tl.program_id(2) // SPLITS, tl.program_id(2) % SPLITS
    offs_q, offs_p, offs_n = tl.arange(0, CHUNK), tl.arange(0, P), tl.arange(0, N)
    first = c * CHUNK
    tokens = first + offs_q
    inside = (tokens < length)[:, None]
    at = tokens.to(PLACE)
    tile = offs_p[:, None] * N + offs_n[None, :]
    B = tl.load(B_ptr + row * B_b + group * B_g + at[:, None] * B_l + offs_n[None, :], mask=inside, other=0.0)
    C = tl.load(C_ptr + row * C_b + group * C_g + at[:, None] * C_l + offs_n[None, :], mask=inside, other=0.0)
    visible = offs_q[:, None] <= offs_q[None, :]
    if HAS_SEQ:
        seq, _, last = _documents(seq_ptr, row, tokens, first, length, CHUNK)
        visible = visible & (seq[:, None] == seq[None, :])
    scores = tl.where(visible, tl.dot(B, tl.trans(C), input_precision=PRECISION), 0.0)  # [s, t]
    itself = offs_q[:, None] == offs_q[None, :]
    dscores = tl.zeros([CHUNK, CHUNK], tl.float32)
    part = tl.num_programs(1).to(tl.int64) * n_heads * padded
    head0 = group * heads_per_group + split * heads_per_split
    steps = (row * n_heads + head0) * padded + first
    dt = tl.load(dt_ptr + steps + offs_q)
    cum = tl.load(cum_ptr + steps + offs_q)
    end = tl.load(cum_ptr + steps + CHUNK - 1)
    D = 0.0
    if HAS_D:
        D = tl.load(D_ptr + head0).to(tl.float32)
    for head in tl.range(head0, head0 + heads_per_split):
        x = tl.load(x_ptr + row * x_b + head * x_h + at[:, None] * x_l + offs_p[None, :], mask=inside, other=0.0)
        dy = tl.load(dy_ptr + row * dy_b + head * dy_h + at[:, None] * dy_l + offs_p[None, :], mask=inside,
                     other=0.0)  # fmt: skip
        grad = tl.load(grads_ptr + ((row * n_chunks + c) * n_heads + head) * P * N + tile)
        steps = (row * n_heads + head) * padded + first
        ahead = steps + tl.where(head + 1 < head0 + heads_per_split, padded, 0)
        next_dt = tl.load(dt_ptr + ahead + offs_q)
        next_cum = tl.load(cum_ptr + ahead + offs_q)
        next_end = tl.load(cum_ptr + ahead + CHUNK - 1)
        next_D = 0.0
        if HAS_D:
            next_D = tl.load(D_ptr + tl.minimum(head + 1, n_heads - 1)).to(tl.float32)
        out = parts_ptr + steps + offs_q

        # pairs inside the chunk; the minimum keeps pairs that do not count (their scores are 0) finite
        decay = tl.exp2(tl.minimum(cum[None, :] - cum[:, None], 0.0))  # [s, t]
        weights = scores * decay * dt[:, None] + tl.where(itself, D, 0.0)  # of dy_t in dx_s
        weights = weights.to(dy.dtype)
        meet = tl.dot(x, tl.trans(dy), input_precision=PRECISION) * decay  # x_s . dy_t, decayed
        dscores += meet * dt[:, None]
        if HAS_D:
            tl.store(out + 3 * part, tl.sum(tl.where(itself, meet, 0.0), 1))  # x . dy: decay is 1 there
        meet *= scores
        tl.store(out + part, tl.sum(meet, 1))
        tl.store(out, tl.sum(meet * dt[:, None], 0))

        # feeding the state that leaves the chunk
        feed = tl.exp2(end - cum)
        if HAS_SEQ:
            feed = tl.where(seq == last, feed, 0.0)
        wanted = tl.dot(B.to(grad.dtype), tl.trans(grad), input_precision=PRECISION) * feed[:, None]  # [s, p]
        tl.store(out + 2 * part, tl.sum(x.to(tl.float32) * wanted, 1))
        dx = tl.dot(weights, dy, wanted * dt[:, None], input_precision=PRECISION)
        tl.store(dx_ptr + row * dx_b + head * dx_h + at[:, None] * dx_l + offs_p[None, :],
                 dx.to(dx_ptr.dtype.element_ty), mask=inside)  # fmt: skip
        dt, cum, end, D = next_dt, next_cum, next_end, next_D
    slot = split * tl.num_programs(1).to(tl.int64) * n_chunks * n_groups * CHUNK * CHUNK
    at_scores = ((row * n_chunks + c) * n_groups + group) * CHUNK * CHUNK
    tl.store(dscores_ptr + slot + at_scores + offs_q[:, None] * CHUNK + offs_q[None, :], dscores)


@triton.jit
def _steps_kernel(dt_ptr, A_ptr, parts_ptr, passed_ptr, ddt_ptr, sums_ptr, length, padded, n_heads,
                  ddt_b, ddt_l, ddt_h, HAS_D: tl.constexpr, SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr,
                  HEADS: tl.constexpr):  # fmt: skip
    """ddt of one chunk and HEADS heads from what the token and the reverse kernel left of each token.

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
def _group_kernel(x_ptr, dy_ptr, dt_ptr, cum_ptr, B_ptr, C_ptr, seq_ptr, dscores_ptr, states_ptr, grads_ptr, parts_ptr, passed_ptr, dB_ptr, dC_ptr,
                  length, padded, n_chunks, n_heads, n_groups, heads_per_group, heads_per_split,
                  x_b, x_l, x_h, dy_b, dy_l, dy_h, B_b, B_l, B_g, C_b, C_l, C_g, dB_s, dB_b, dB_l, dB_g, dC_s, dC_b, dC_l, dC_g,
                  CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, SPLITS: tl.constexpr, HAS_SEQ: tl.constexpr,
                  PLACE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dB and dC of one chunk and group: sums over heads that stay in registers. Same splits as `_token_kernel`.

    Since it has both states, it also computes their contribution to the gradients of the decays: parts[4], each token's
    y . dy as far as it read the entering state, and passed [b, chunks, h], the product of the entering state and its
    gradient through the chunk.
    """
    c, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group, split = tl.program_id(2) // SPLITS, tl.program_id(2) % SPLITS
    offs_q, offs_p, offs_n = tl.arange(0, CHUNK), tl.arange(0, P), tl.arange(0, N)
    first = c * CHUNK
    tokens = first + offs_q
    inside = (tokens < length)[:, None]
    at = tokens.to(PLACE)
    tile = offs_p[:, None] * N + offs_n[None, :]
    if HAS_SEQ:
        seq, before, last = _documents(seq_ptr, row, tokens, first, length, CHUNK)
    C = tl.load(C_ptr + row * C_b + group * C_g + at[:, None] * C_l + offs_n[None, :], mask=inside, other=0.0)
    part = tl.num_programs(1).to(tl.int64) * n_heads * padded
    dB = tl.zeros([CHUNK, N], tl.float32)
    dC = tl.zeros([CHUNK, N], tl.float32)
    head0 = group * heads_per_group + split * heads_per_split
    for head in tl.range(head0, head0 + heads_per_split):
        x = tl.load(x_ptr + row * x_b + head * x_h + at[:, None] * x_l + offs_p[None, :], mask=inside, other=0.0)
        dy = tl.load(dy_ptr + row * dy_b + head * dy_h + at[:, None] * dy_l + offs_p[None, :], mask=inside,
                     other=0.0)  # fmt: skip
        where = (row * n_chunks + c) * n_heads + head
        state = tl.load(states_ptr + where * P * N + tile)
        grad = tl.load(grads_ptr + where * P * N + tile)
        steps = (row * n_heads + head) * padded
        cum = tl.load(cum_ptr + steps + tokens)
        reads = tl.exp2(cum)
        end = tl.load(cum_ptr + steps + first + CHUNK - 1)
        feed = tl.exp2(end - cum) * tl.load(dt_ptr + steps + tokens)
        carry = tl.exp2(end)
        if HAS_SEQ:
            reads = tl.where(seq == before, reads, 0.0)
            feed = tl.where(seq == last, feed, 0.0)
            carry = tl.where(before == last, carry, 0.0)
        seen = tl.dot(C.to(state.dtype), tl.trans(state), input_precision=PRECISION)  # [t, p]
        tl.store(parts_ptr + 4 * part + steps + tokens, tl.sum(dy.to(tl.float32) * seen, 1) * reads)
        tl.store(passed_ptr + where, carry * tl.sum(tl.sum(state.to(tl.float32) * grad.to(tl.float32), 1), 0))
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
    B = tl.load(B_ptr + row * B_b + group * B_g + at[:, None] * B_l + offs_n[None, :], mask=inside, other=0.0)
    dB = tl.dot(pairs, C, dB, input_precision=PRECISION)
    dC = tl.dot(tl.trans(pairs), B, dC, input_precision=PRECISION)
    out_B = dB_ptr + split * dB_s + row * dB_b + group * dB_g
    out_C = dC_ptr + split * dC_s + row * dC_b + group * dC_g
    tl.store(out_B + tokens.to(tl.int64)[:, None] * dB_l + offs_n[None, :], dB.to(dB_ptr.dtype.element_ty), mask=inside)
    tl.store(out_C + tokens.to(tl.int64)[:, None] * dC_l + offs_n[None, :], dC.to(dC_ptr.dtype.element_ty), mask=inside)


def turns(dtype: torch.dtype, p: int, n: int) -> bool:
    """Whether `_reverse_kernel` stores its state transposed: faster in half precision, where both sides fill a warpgroup."""
    return dtype != torch.float32 and p >= 64 and n >= 64


def head_splits(b: int, n_chunks: int, groups: int, heads_per_group: int) -> int:
    """How many programs share the heads of one chunk and group: enough to fill the GPU, few enough to add up cheaply."""
    splits = 1
    while splits < 4 and heads_per_group % (2 * splits) == 0 and b * n_chunks * groups * splits < PROGRAMS:
        splits *= 2
    return splits


def scan_backward(dy, x, dt, cum, A, B, C, D, seq_idx, states, dfinal, *, dx, ddt, dB, dC, softplus: bool, leave=None):
    """The backward pass. Written in place, with any strides but a contiguous last dimension: dx [b, l, h, p], dB and dC
    [b, l, g, n]; and ddt [b, l, h], of any strides.

    Args:
        dfinal: gradient of the last state [b, h, p, n] float32, or None.
        softplus: ddt is the gradient of raw dt (before bias and softplus) instead of dt's.
        leave: where the row's later tokens are elsewhere: gives dfinal from the initial state's gradient as far as it
            comes from dy.

    Returns:
        The gradients of A, D and dt's bias [3, h] and of the initial state [b, h, p, n], all float32.
    """
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    n_chunks = cum.shape[-1] // CHUNK
    count, per_segment = segments(b, h, n_chunks)
    grads = torch.empty_like(states)
    parts = torch.empty((5, *cum.shape), dtype=torch.float32, device=x.device)
    passed = torch.empty((b, n_chunks, h), dtype=torch.float32, device=x.device)
    seq = seq_idx if seq_idx is not None else dt
    precision = precision_of(x.dtype)
    turned, place = turns(x.dtype, p, n), place_type(l, x, dy, B, C, dx)

    def launch(final: torch.Tensor | None, keep: bool) -> torch.Tensor:
        initial = torch.empty((b, count, h, p, n), dtype=torch.float32, device=x.device)
        _reverse_kernel[(h, b * count)](
            dy, cum, C, seq, final if final is not None else dt, grads, initial, l, cum.shape[-1], n_chunks,
            per_segment, count, h, h // g, *dy.stride()[:3], *C.stride()[:3], CHUNK=CHUNK, P=p, N=n,
            HAS_SEQ=seq_idx is not None, HAS_FINAL=final is not None, KEEP=keep, TURNED=turned, PLACE=place,
            PRECISION=precision, **launch_options("reverse turned" if turned else "reverse", x.dtype),
        )  # fmt: skip
        return initial

    leaving = dfinal[:, None] if dfinal is not None else None
    if count > 1 or leave is not None:
        added = launch(None, keep=False)
        left = segment_decay(cum, seq_idx, l, count, per_segment)
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
    sizes = (l, cum.shape[-1], n_chunks, h, g, h // g, h // g // splits)
    strides = (*x.stride()[:3], *dy.stride()[:3], *B.stride()[:3], *C.stride()[:3])
    shapes = {"CHUNK": CHUNK, "P": p, "N": n, "SPLITS": splits, "HAS_SEQ": seq_idx is not None, "PLACE": place,
              "PRECISION": precision}  # fmt: skip
    _token_kernel[(n_chunks, b, g * splits)](
        x, dy, dt, cum, B, C, D if D is not None else dt, seq, grads, dx, parts, dscores, *sizes, *strides,
        *dx.stride()[:3], HAS_D=D is not None, **shapes, **launch_options("token", x.dtype),
    )  # fmt: skip
    # one split writes its sums in place; several leave them to be added up
    out_B, out_C = (t[None] if splits == 1 else t.new_empty((splits, *t.shape), dtype=torch.float32) for t in (dB, dC))
    _group_kernel[(n_chunks, b, g * splits)](
        x, dy, dt, cum, B, C, seq, dscores, states, grads, parts, passed, out_B, out_C, *sizes, *strides, *out_B.stride()[:4],
        *out_C.stride()[:4], **shapes, **launch_options("group", x.dtype),
    )  # fmt: skip
    block = min(16, triton.next_power_of_2(h))
    _steps_kernel[(n_chunks, b, triton.cdiv(h, block))](
        dt, A, parts, passed, ddt, sums, l, cum.shape[-1], h, *ddt.stride(), HAS_D=D is not None, SOFTPLUS=softplus,
        CHUNK=CHUNK, HEADS=block, num_warps=4,
    )  # fmt: skip
    if splits > 1:
        dB.copy_(out_B.sum(0))
        dC.copy_(out_C.sum(0))
    return sums.sum(1), dinitial
