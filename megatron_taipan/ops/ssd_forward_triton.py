"""The forward kernels of the SSD scan, and helpers that the backward ones use too; see `ssd_triton`."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from megatron_taipan.ops.ssd_tiles import (
    CHUNK,
    load_tokens,
    of_states,
    of_tokens,
    place_type,
    shared_memory,
    store_state,
    store_tokens,
    tiled,
)

LOG2E = 1.4426950408889634
PROGRAMS = 256  # programs that fill the GPU in the serial kernels; fewer rows x heads are cut in segments


@triton.jit
def softplus(u):
    """log(1 + exp(u)); a series where exp(u) is small, because the approximate logarithm loses digits near 1."""
    e = tl.exp(tl.minimum(u, 20.0))
    series = e * (1 - e * (1 / 2 - e * (1 / 3 - e * (1 / 4 - e * (1 / 5 - e * (1 / 6 - e / 7))))))
    return tl.where(u > 20.0, u, tl.where(e < 0.0625, series, tl.log(1 + e)))


@triton.jit
def _decay_kernel(dt_ptr, bias_ptr, A_ptr, seq_ptr, dt_out_ptr, cum_ptr, starts_ptr, length, padded, n_heads,
                  stride_b, stride_l, stride_h, SOFTPLUS: tl.constexpr, HAS_SEQ: tl.constexpr, CHUNK: tl.constexpr,
                  HEADS: tl.constexpr, LOG2E: tl.constexpr):  # fmt: skip
    """What `Decays` has of one chunk and HEADS heads; dt = 0 past the end."""
    chunk, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs_q = tl.arange(0, CHUNK)
    tokens = chunk * CHUNK + offs_q
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
    if HAS_SEQ:
        if tl.program_id(2) == 0:
            base = seq_ptr + row * length
            seq = tl.load(base + tl.minimum(tokens, length - 1))
            begins = seq != tl.load(base + tl.minimum(tl.maximum(tokens - 1, 0), length - 1))
            earlier = begins[None, :] & (offs_q[None, :] <= offs_q[:, None])  # [t, s]
            tl.store(starts_ptr + row * padded + tokens, tl.max(tl.where(earlier, offs_q[None, :], -1), 1))


@triton.jit
def _scan_kernel(x, dt_ptr, cum_ptr, starts_ptr, B, C, D_ptr, init_ptr, y, states, final_ptr,
                 length, padded, n_chunks, per_segment, n_segments, n_heads, heads_per_group,
                 x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, y_b, y_l, y_h,
                 CHUNK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, HAS_D: tl.constexpr, HAS_SEQ: tl.constexpr,
                 HAS_INIT: tl.constexpr, OUTPUT: tl.constexpr, KEEP: tl.constexpr, FINAL: tl.constexpr,
                 STATE: tl.constexpr, PLACE: tl.constexpr, TILED: tl.constexpr, PRECISION: tl.constexpr,
                 STAGES: tl.constexpr):  # fmt: skip
    """Scans one segment of one head. OUTPUT: write y; FINAL: write the state that leaves.

    KEEP: 1 writes the state that enters each chunk, as y reads it; k > 1 every k-th one in float32, from which the others
    come out again bit for bit; 0 none. States in float32 are written between two loops: inside, their addresses would
    take registers that the loop needs.
    """
    BETWEEN: tl.constexpr = KEEP if KEEP > 1 else 1 << 30  # chunks of the inner loop: more than there are, for one
    BY_ENGINE: tl.constexpr = TILED and OUTPUT  # the states; what writes nothing else is faster without it
    head = tl.program_id(0)
    row, segment = tl.program_id(1) // n_segments, tl.program_id(1) % n_segments
    group = head // heads_per_group
    offs_q = tl.arange(0, CHUNK)
    tile = tl.arange(0, P)[:, None] * N + tl.arange(0, N)[None, :]
    slot = ((row.to(tl.int64) * n_segments + segment) * n_heads + head) * P * N
    state = tl.zeros([P, N], tl.float32)
    if HAS_INIT:
        state = tl.load(init_ptr + slot + tile).to(tl.float32)
    if HAS_D:
        D = tl.load(D_ptr + head).to(tl.float32)
    steps = (row.to(tl.int64) * n_heads + head) * padded
    dt_row, cum_row, starts_row = dt_ptr + steps, cum_ptr + steps, starts_ptr + row.to(tl.int64) * padded
    begin, stop = segment * per_segment, tl.minimum((segment + 1) * per_segment, n_chunks)
    for part in tl.range(begin // BETWEEN, tl.cdiv(stop, BETWEEN), num_stages=1):
        if KEEP > 1:
            if part * BETWEEN >= begin:
                store_state(states, state, (row * tl.cdiv(n_chunks, KEEP) + part) * n_heads + head, P, N, BY_ENGINE)
        for c in tl.range(tl.maximum(begin, part * BETWEEN), tl.minimum(stop, (part + 1) * BETWEEN), num_stages=STAGES):
            first = c * CHUNK
            x_c = load_tokens(x, row, first, head * x_h, x_b, x_l, length, CHUNK, P, PLACE, TILED)
            B_c = load_tokens(B, row, first, group * B_g, B_b, B_l, length, CHUNK, N, PLACE, TILED)
            dt = tl.load(dt_row + first + offs_q)
            cum = tl.load(cum_row + first + offs_q)
            end = tl.load(cum_row + first + CHUNK - 1)
            feed = tl.exp2(end - cum) * dt
            carry = tl.exp2(end)
            if HAS_SEQ:
                starts = tl.load(starts_row + first + offs_q)
                last = tl.load(starts_row + first + CHUNK - 1)
                feed = tl.where(offs_q >= last, feed, 0.0)
                carry = tl.where(last < 0, carry, 0.0)
            entering = state.to(STATE)
            # here, so that it is in shared memory by its product
            fed = (x_c.to(tl.float32) * feed[:, None]).to(x_c.dtype)
            if KEEP == 1:
                store_state(states, entering, (row * n_chunks + c) * n_heads + head, P, N, BY_ENGINE)
            if OUTPUT:
                C_c = load_tokens(C, row, first, group * C_g, C_b, C_l, length, CHUNK, N, PLACE, TILED)
                scores = tl.dot(C_c, tl.trans(B_c), input_precision=PRECISION)  # [t, s]
                reads = tl.exp2(cum)
                if HAS_SEQ:  # starts <= s <= t in one comparison
                    since, reach = offs_q[None, :] - starts[:, None], (offs_q - starts)[:, None]
                    visible = since.to(tl.uint32) <= reach.to(tl.uint32)
                    reads = tl.where(starts < 0, reads, 0.0)
                else:
                    visible = offs_q[:, None] >= offs_q[None, :]
                weights = tl.where(visible, scores * tl.exp2(cum[:, None] - cum[None, :]) * dt[None, :], 0.0)
                y_c = tl.dot(C_c.to(STATE), tl.trans(entering), input_precision=PRECISION) * reads[:, None]
                y_c = tl.dot(weights.to(x_c.dtype), x_c, y_c, input_precision=PRECISION)
                if HAS_D:
                    y_c += D * x_c.to(tl.float32)
                store_tokens(y, y_c, row, first, head * y_h, y_b, y_l, length, CHUNK, P, PLACE, TILED)
            state = tl.dot(tl.trans(fed), B_c, state * carry, input_precision=PRECISION)
    if FINAL:
        tl.store(final_ptr + slot + tile, state)


def launch_options(kernel: str, dtype: torch.dtype, by_engine: bool, p: int, n: int, shared: int) -> dict[str, int]:
    """num_warps, num_stages and STAGES for heads of p channels and states [p, n], measured on an H200 (docs/lab-notes.md).

    The stages twice: a loop that names them itself is compiled otherwise, and so it was measured.

    Args:
        shared: bytes of shared memory that a program may have: 227 KiB there, 163 on an A100, 99 on GPUs for desktops.
    """
    if dtype == torch.float32:
        return {"num_warps": 8, "num_stages": 1, "STAGES": 1}
    warps, stages, stages_of_loads = {
        "scan": (4, 2, 1),
        "states": (4, 3, 1),
        "reverse": (4, 3, 3),
        "reverse turned": (8, 3, 3),
        "token": (4, 2, 3),
        "group": (8, 4, 3),
    }[kernel]
    stages = stages if by_engine else stages_of_loads
    if kernel == "group":  # the tiles of one head: x, dy and both states
        stages = min(stages, max(1, 1 + (shared - (32 << 10)) // (4 * p * (CHUNK + n))))
    return {"num_warps": warps, "num_stages": stages, "STAGES": stages}


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """States kept for backward are bfloat16 in half precision: float16's range is too small for their gradients."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def precision_of(dtype: torch.dtype) -> str:
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _tl(dtype: torch.dtype):
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def segments(b: int, heads: int, n_chunks: int) -> tuple[int, int]:
    """(segments, chunks per segment): more than one segment only where rows x heads leave the GPU half empty."""
    wanted = max(1, min(PROGRAMS // max(1, b * heads), n_chunks // 8))
    per_segment = -(-n_chunks // wanted)
    return -(-n_chunks // per_segment), per_segment


class Decays(NamedTuple):
    """What the kernels need to know of each token, [b, h, padded l] float32: rows are padded to whole chunks."""

    dt: torch.Tensor
    cum: torch.Tensor  # the running sum of dt A within the chunk, times log2(e)
    # [b, padded l] int32: where in the chunk the token's document begins, -1: before the chunk; None: one document a row
    starts: torch.Tensor | None


def prepare_decay(dt: torch.Tensor, bias: torch.Tensor | None, A: torch.Tensor, seq_idx: torch.Tensor | None) -> Decays:
    """Of dt [b, l, h] (raw, with bias, then softplus; or final, bias None).

    Args:
        A: [h] float32, below 0.
        seq_idx: [b, l] int32, contiguous, or None: a document is a run of tokens with the same number. What enters the
            row is of its first token's document.
    """
    b, l, h = dt.shape
    n_chunks = triton.cdiv(l, CHUNK)
    out, cum = (torch.empty((b, h, n_chunks * CHUNK), dtype=torch.float32, device=dt.device) for _ in range(2))
    starts = None
    if seq_idx is not None:
        starts = torch.empty((b, n_chunks * CHUNK), dtype=torch.int32, device=dt.device)
    block = min(16, triton.next_power_of_2(h))
    _decay_kernel[(n_chunks, b, triton.cdiv(h, block))](
        dt, A if bias is None else bias, A, seq_idx if seq_idx is not None else A, out, cum,
        starts if starts is not None else A, l, n_chunks * CHUNK, h, *dt.stride(), SOFTPLUS=bias is not None,
        HAS_SEQ=seq_idx is not None, CHUNK=CHUNK, HEADS=block, LOG2E=LOG2E, num_warps=4,
    )  # fmt: skip
    return Decays(out, cum, starts)


def segment_decay(decays: Decays, count: int, per_segment: int) -> torch.Tensor:
    """[b, segments, h, 1, 1]: how much of the state that enters a segment is left when it ends."""
    b, h, _ = decays.cum.shape
    ends = decays.cum[..., CHUNK - 1 :: CHUNK]  # [b, h, chunks]
    missing = count * per_segment - ends.shape[-1]
    ends = torch.nn.functional.pad(ends, (0, missing))
    left = ends.view(b, h, count, per_segment).sum(-1).exp2().transpose(1, 2)  # [b, segments, h]
    if decays.starts is not None:
        goes_on = torch.nn.functional.pad(decays.starts[:, CHUNK - 1 :: CHUNK] < 0, (0, missing), value=True)
        left = left * goes_on.view(b, count, per_segment).all(-1)[..., None]
    return left[..., None, None]


def scan_forward(x, decays: Decays, B, C, D, initial_state, *, keep: int, enter=None):
    """The forward pass on prepared decays.

    Args:
        x: [b, l, h, p], B, C: [b, l, g, n], last dimension contiguous; decays: from `prepare_decay`.
        keep: 1 keeps the state that enters each chunk; k > 1 every k-th one, for `scan_states`; 0 none.
        enter: where the row's earlier tokens are elsewhere: gives the initial state [b, h, p, n] float32 from what is
            left after the last token, of an empty one and as a share [b, h] of any other.

    Returns:
        y [b, l, h, p] contiguous; states [b, chunks or chunks / k, h, p, n] that enter chunks, in float32 for k > 1
        (empty for 0); the state after the last token [b, h, p, n] float32.
    """
    b, l, h, p = x.shape
    n = B.shape[-1]
    n_chunks = decays.cum.shape[-1] // CHUNK
    count, per_segment = segments(b, h, n_chunks)
    y = torch.empty((b, l, h, p), dtype=x.dtype, device=x.device)
    states = torch.empty(
        (b, triton.cdiv(n_chunks, keep), h, p, n) if keep else (0,),
        dtype=torch.float32 if keep > 1 else state_dtype(x.dtype), device=x.device,
    )  # fmt: skip

    def launch(init: torch.Tensor | None, output: bool) -> torch.Tensor:
        final = torch.empty((b, count, h, p, n), dtype=torch.float32, device=x.device)
        _launch_scan(
            x, decays, B, C, D, init, y, states, final, count, per_segment, output=output, keep=keep if output else 0
        )  # fmt: skip
        return final

    entering = initial_state[:, None] if initial_state is not None else None
    if count > 1 or enter is not None:
        added = launch(None, output=False)
        left = segment_decay(decays, count, per_segment)
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


def scan_states(x, decays: Decays, B, kept, every: int):
    """The state that enters each chunk [b, chunks, h, p, n], bit for bit as `scan_forward` has it with keep=1.

    Args:
        kept: what `scan_forward` kept with keep=every. From each of them a program goes on, so that there are enough
            programs for the GPU where the forward pass, which starts from the beginning, is serial.
    """
    b, _, h, p = x.shape
    n_chunks = decays.cum.shape[-1] // CHUNK
    states = torch.empty((b, n_chunks, h, p, B.shape[-1]), dtype=state_dtype(x.dtype), device=x.device)
    _launch_scan(x, decays, B, B, None, kept, x, states, None, kept.shape[1], every, output=False, keep=1)
    return states


def _launch_scan(
    x, decays: Decays, B, C, D, init, y, states, final, count: int, per_segment: int, *, output: bool, keep: int
) -> None:
    """`_scan_kernel` over `count` segments of each head; what is None is not read or written."""
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    cum, starts = decays.cum, decays.starts
    by_engine = tiled(x, B, C, y)
    _scan_kernel[(h, b * count)](
        of_tokens(x, by_engine), decays.dt, cum, starts if starts is not None else cum, of_tokens(B, by_engine),
        of_tokens(C, by_engine), D if D is not None else cum, init if init is not None else cum, of_tokens(y, by_engine),
        of_states(states, by_engine and output), final if final is not None else cum, l, cum.shape[-1], cum.shape[-1] // CHUNK,
        per_segment, count, h, h // g, *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *y.stride()[:3], CHUNK=CHUNK,
        P=p, N=n, HAS_D=D is not None, HAS_SEQ=starts is not None, HAS_INIT=init is not None, OUTPUT=output, KEEP=keep,
        FINAL=final is not None, STATE=_tl(state_dtype(x.dtype)), PLACE=place_type(l, x, B, C, y), TILED=by_engine,
        PRECISION=precision_of(x.dtype),
        **launch_options("scan" if final is not None else "states", x.dtype, by_engine, p, n, shared_memory(x.device)),
    )  # fmt: skip
