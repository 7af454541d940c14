"""The forward kernels of the SSD scan, and helpers that the backward ones use too; see `ssd_triton`."""

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634
CHUNK = 64  # tokens handled at once: one 64 x 64 tile of scores a warpgroup; measured in docs/lab-notes.md
PROGRAMS = 256  # programs that fill the GPU in the serial kernels; fewer rows x heads are cut in segments


@triton.jit
def softplus(u):
    """log(1 + exp(u)); a series where exp(u) is small, because the approximate logarithm loses digits near 1."""
    e = tl.exp(tl.minimum(u, 20.0))
    series = e * (1 - e * (1 / 2 - e * (1 / 3 - e * (1 / 4 - e * (1 / 5 - e * (1 / 6 - e / 7))))))
    return tl.where(u > 20.0, u, tl.where(e < 0.0625, series, tl.log(1 + e)))


@triton.jit
def _decay_kernel(dt_ptr, bias_ptr, A_ptr, dt_out_ptr, cum_ptr, length, padded, n_heads, stride_b, stride_l, stride_h,
                  SOFTPLUS: tl.constexpr, CHUNK: tl.constexpr, HEADS: tl.constexpr, LOG2E: tl.constexpr):  # fmt: skip
    """dt (after bias and softplus) and cum, both [b, h, padded length] float32; dt = 0 past the end."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tokens = chunk * CHUNK + tl.arange(0, CHUNK)
    heads = tl.program_id(2) * HEADS + tl.arange(0, HEADS)
    inside = (tokens < length)[:, None] & (heads < n_heads)[None, :]
    dt = tl.load(dt_ptr + row * stride_b + tokens.to(tl.int64)[:, None] * stride_l + heads[None, :] * stride_h,
                 mask=inside, other=0.0).to(tl.float32)  # fmt: skip
    if SOFTPLUS:
        dt = softplus(dt + tl.load(bias_ptr + heads, mask=heads < n_heads, other=0.0)[None, :])
    dt = tl.where(inside, dt, 0.0)
    A = tl.load(A_ptr + heads, mask=heads < n_heads, other=0.0)
    cum = tl.cumsum(dt * A[None, :], 0) * LOG2E
    out = (row * n_heads + heads)[None, :] * padded + tokens[:, None]
    mask = (heads < n_heads)[None, :] & (tokens < padded)[:, None]
    tl.store(dt_out_ptr + out, dt, mask=mask)
    tl.store(cum_ptr + out, cum, mask=mask)


@triton.jit
def _documents(seq_ptr, row, tokens, first, length, CHUNK: tl.constexpr):
    """Documents of a chunk's tokens (-1 past the end), of the token before it, and of its last token."""
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
                 HAS_INIT: tl.constexpr, OUTPUT: tl.constexpr, KEEP: tl.constexpr, FINAL: tl.constexpr,
                 STATE: tl.constexpr, PLACE: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Scans one segment of one head. OUTPUT: write y; FINAL: write the state that leaves.

    KEEP: 1 writes the state that enters each chunk, as y reads it; k > 1 every k-th one in float32, from which the others
    come out again bit for bit; 0 none.
    """
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
        at = tokens.to(PLACE)
        x = tl.load(x_base + at[:, None] * x_l + offs_p[None, :], mask=inside, other=0.0)
        B = tl.load(B_base + at[:, None] * B_l + offs_n[None, :], mask=inside, other=0.0)
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
            C = tl.load(C_base + at[:, None] * C_l + offs_n[None, :], mask=inside, other=0.0)
        if KEEP == 1:
            tl.store(states_ptr + ((row * n_chunks + c) * n_heads + head) * P * N + tile, state.to(STATE))
        elif KEEP > 1:
            if c % KEEP == 0:
                slot_c = (row * tl.cdiv(n_chunks, KEEP) + c // KEEP) * n_heads + head
                tl.store(states_ptr + slot_c * P * N + tile, state)
        if OUTPUT:
            entering = state.to(STATE)
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
            tl.store(y_base + at[:, None] * y_l + offs_p[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)
        fed = (x.to(tl.float32) * feed[:, None]).to(x.dtype)
        state = tl.dot(tl.trans(fed), B, state * carry, input_precision=PRECISION)
    if FINAL:
        tl.store(final_ptr + slot + tile, state)


def launch_options(kernel: str, dtype: torch.dtype) -> dict[str, int]:
    """num_warps and num_stages, measured on an H100 (docs/lab-notes.md)."""
    if dtype == torch.float32:
        return {"num_warps": 8, "num_stages": 1}
    return {
        "scan": {"num_warps": 4, "num_stages": 1},
        "states": {"num_warps": 4, "num_stages": 1},  # not measured
        "reverse": {"num_warps": 4, "num_stages": 3},
        "reverse turned": {"num_warps": 8, "num_stages": 3},
        "token": {"num_warps": 4, "num_stages": 3},
        "group": {"num_warps": 8, "num_stages": 3},
    }[kernel]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """States kept for backward are bfloat16 in half precision: float16's range is too small for their gradients."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def precision_of(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _tl(dtype: torch.dtype):
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def place_type(length: int, *tensors: torch.Tensor):
    """Of a token as the factor of a stride: int64 where offsets within a row [b, length, ...] of one of the tensors
    pass 2^31, as those of the 1.3B models' projections of 8,512 columns do from 252,289 tokens on."""
    return tl.int64 if any(length * tensor.stride(1) >= 2**31 for tensor in tensors) else tl.int32


def segments(b: int, heads: int, n_chunks: int) -> tuple[int, int]:
    """(segments, chunks per segment): more than one segment only where rows x heads leave the GPU half empty."""
    wanted = max(1, min(PROGRAMS // max(1, b * heads), n_chunks // 8))
    per_segment = -(-n_chunks // wanted)
    return -(-n_chunks // per_segment), per_segment


def prepare_decay(dt: torch.Tensor, bias: torch.Tensor | None, A: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dt [b, l, h] (raw, with bias, then softplus; or final, bias None) -> dt and cum [b, h, padded l] float32."""
    b, l, h = dt.shape
    n_chunks = triton.cdiv(l, CHUNK)
    out, cum = (torch.empty((b, h, n_chunks * CHUNK), dtype=torch.float32, device=dt.device) for _ in range(2))
    block = min(16, triton.next_power_of_2(h))
    _decay_kernel[(n_chunks, b, triton.cdiv(h, block))](
        dt, A if bias is None else bias, A, out, cum, l, n_chunks * CHUNK, h, *dt.stride(), SOFTPLUS=bias is not None,
        CHUNK=CHUNK, HEADS=block, LOG2E=LOG2E, num_warps=4,
    )  # fmt: skip
    return out, cum


def segment_decay(cum: torch.Tensor, seq_idx: torch.Tensor | None, length: int, count: int, per_segment: int):
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


def scan_forward(x, dt, cum, B, C, D, seq_idx, initial_state, *, keep: int, enter=None):
    """The forward pass on prepared decays.

    Args:
        x: [b, l, h, p], B, C: [b, l, g, n], last dimension contiguous; dt, cum: from `prepare_decay`.
        keep: 1 keeps the state that enters each chunk; k > 1 every k-th one, for `scan_states`; 0 none.
        enter: where the row's earlier tokens are elsewhere: gives the initial state [b, h, p, n] float32 from what is
            left after the last token, of an empty one and as a share [b, h] of any other.

    Returns:
        y [b, l, h, p] contiguous; states [b, chunks or chunks / k, h, p, n] that enter chunks, in float32 for k > 1
        (empty for 0); the state after the last token [b, h, p, n] float32.
    """
    b, l, h, p = x.shape
    n = B.shape[-1]
    n_chunks = cum.shape[-1] // CHUNK
    count, per_segment = segments(b, h, n_chunks)
    y = torch.empty((b, l, h, p), dtype=x.dtype, device=x.device)
    states = torch.empty(
        (b, triton.cdiv(n_chunks, keep), h, p, n) if keep else (0,),
        dtype=torch.float32 if keep > 1 else state_dtype(x.dtype), device=x.device,
    )  # fmt: skip

    def launch(init: torch.Tensor | None, output: bool) -> torch.Tensor:
        final = torch.empty((b, count, h, p, n), dtype=torch.float32, device=x.device)
        _launch_scan(
            x, dt, cum, B, C, D, seq_idx, init, y, states, final, count, per_segment, output=output,
            keep=keep if output else 0,
        )  # fmt: skip
        return final

    entering = initial_state[:, None] if initial_state is not None else None
    if count > 1 or enter is not None:
        added = launch(None, output=False)
        left = segment_decay(cum, seq_idx, l, count, per_segment)
        state = initial_state.float() if initial_state is not None else torch.zeros_like(added[:, 0])
        entering = torch.empty_like(added)
        for i in range(count):
            entering[:, i] = state
            state = left[:, i] * state + added[:, i]
        if enter is not None:
            shares = left.cumprod(1)
            before = enter(state, shares[:, -1, :, 0, 0])[:, None]
            entering[:, :1] += before
            entering[:, 1:].addcmul_(shares[:, :-1], before)
    final = launch(entering.contiguous() if entering is not None else None, output=True)
    return y, states, final[:, -1].contiguous()


def scan_states(x, dt, cum, B, seq_idx, kept, every: int):
    """The state that enters each chunk [b, chunks, h, p, n], bit for bit as `scan_forward` has it with keep=1.

    Args:
        kept: what `scan_forward` kept with keep=every. From each of them a program goes on, so that there are enough
            programs for the GPU where the forward pass, which starts from the beginning, is serial.
    """
    b, _, h, p = x.shape
    n_chunks = cum.shape[-1] // CHUNK
    states = torch.empty((b, n_chunks, h, p, B.shape[-1]), dtype=state_dtype(x.dtype), device=x.device)
    _launch_scan(
        x, dt, cum, B, B, None, seq_idx, kept, x, states, None, kept.shape[1], every, output=False, keep=1
    )  # fmt: skip
    return states


def _launch_scan(
    x, dt, cum, B, C, D, seq_idx, init, y, states, final, count: int, per_segment: int, *, output: bool, keep: int
) -> None:
    """`_scan_kernel` over `count` segments of each head; what is None is not read or written."""
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    _scan_kernel[(h, b * count)](
        x, dt, cum, B, C, D if D is not None else dt, seq_idx if seq_idx is not None else dt,
        init if init is not None else dt, y, states, final if final is not None else dt, l, cum.shape[-1],
        cum.shape[-1] // CHUNK, per_segment, count, h, h // g, *x.stride()[:3], *B.stride()[:3], *C.stride()[:3],
        *y.stride()[:3], CHUNK=CHUNK, P=p, N=n, HAS_D=D is not None, HAS_SEQ=seq_idx is not None,
        HAS_INIT=init is not None, OUTPUT=output, KEEP=keep, FINAL=final is not None, STATE=_tl(state_dtype(x.dtype)),
        PLACE=place_type(l, x, B, C, y), PRECISION=precision_of(x.dtype),
        **launch_options("scan" if final is not None else "states", x.dtype),
    )  # fmt: skip
