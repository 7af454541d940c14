"""The operations of one decoded token per row in Triton, bound by the memory that they read, and for few rows by the
number of launches: so each takes its inputs as the layer's product left them.

Attention: a row's keys are split into spans, each read by a separate program, so that a single row also fills the GPU; a
second kernel combines the spans' softmax parts (Flash-Decoding). Grids and loads depend on shapes alone, so a captured
launch is right for every later token. The token's own key and value come from the product: one program of each key head
writes them into the buffers, and no program reads them there.

The convolution: each program owns some channels of one row, reads their last inputs and then moves them on in place.

The scan: each program loads a tile of one head's state, updates it in place and reads it out.
"""

import torch
import triton
import triton.language as tl

from megatron_taipan.ops.ssd_forward_triton import softplus

LOG2E = 1.4426950408889634
SPAN = 256  # slots that one program reads


@triton.jit
def _span_kernel(q_ptr, new_k_ptr, new_v_ptr, k_ptr, v_ptr, position_ptr, start_ptr, first_ptr, chosen_ptr, acc_ptr,
                 top_ptr, sum_ptr, stride_q, stride_new_k, stride_new_v, stride_row, stride_slot, stride_head,
                 stride_start, stride_chosen, window, heads, scale_log2, GROUP: tl.constexpr, D: tl.constexpr,
                 D_PAD: tl.constexpr, WINDOWED: tl.constexpr, CHOSEN: tl.constexpr, SPAN: tl.constexpr,
                 BLOCK: tl.constexpr):  # fmt: skip
    """Unnormalised softmax(q k) v over one span of one row's slots, for one query head; the first span of a key head
    writes the new key and value."""
    # heads first: programs that start together read neighbouring addresses
    head, span, row, spans = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64), tl.num_programs(1)
    position, first = tl.load(position_ptr), tl.load(first_ptr)
    low = tl.load(start_ptr + row * stride_start)
    if WINDOWED:
        low = tl.maximum(low, position - window + 1)
    newest = (position - first).to(tl.int32)
    lo = (low - first).to(tl.int32) + span * SPAN
    end = tl.minimum(lo + SPAN, newest)
    has_new = (newest >= lo) & (newest < lo + SPAN)
    if CHOSEN:
        attends = tl.load(chosen_ptr + row * stride_chosen) != 0
        end, has_new = tl.where(attends, end, lo), has_new & attends
    offs_d = tl.arange(0, D_PAD)
    inside = offs_d < D
    q = tl.load(q_ptr + row * stride_q + head * D + offs_d, mask=inside, other=0.0).to(tl.float32) * scale_log2
    new_k = tl.load(new_k_ptr + row * stride_new_k + (head // GROUP) * D + offs_d, mask=inside, other=0.0)
    new_v = tl.load(new_v_ptr + row * stride_new_v + (head // GROUP) * D + offs_d, mask=inside, other=0.0)
    base = row * stride_row + (head // GROUP) * stride_head
    writes = inside & (span == 0) & (head % GROUP == 0)
    tl.store(k_ptr + base + newest.to(tl.int64) * stride_slot + offs_d, new_k, mask=writes)
    tl.store(v_ptr + base + newest.to(tl.int64) * stride_slot + offs_d, new_v, mask=writes)
    acc = tl.zeros([D_PAD], tl.float32)
    top, total = float("-inf"), 0.0
    for begin in range(lo, end, BLOCK):
        slots = begin + tl.arange(0, BLOCK)
        mask = (slots < end)[:, None] & inside[None, :]
        at = base + slots.to(tl.int64)[:, None] * stride_slot + offs_d[None, :]
        k = tl.load(k_ptr + at, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + at, mask=mask, other=0.0).to(tl.float32)
        s = tl.where(slots < end, tl.sum(k * q[None, :], 1), float("-inf"))
        new = tl.maximum(top, tl.max(s, 0))  # finite: a block has a slot
        p = tl.exp2(s - new)
        old = tl.exp2(top - new)
        total = total * old + tl.sum(p, 0)
        acc = acc * old + tl.sum(p[:, None] * v, 0)
        top = new
    s = tl.where(has_new, tl.sum(new_k.to(tl.float32) * q, 0), float("-inf"))
    new = tl.maximum(top, s)
    p = tl.where(has_new, tl.exp2(s - new), 0.0)
    old = tl.where(has_new, tl.exp2(top - new), 1.0)  # without it `new` may be infinite
    total = total * old + p
    acc = acc * old + p * new_v.to(tl.float32)
    top = new
    out = (row * heads + head) * spans + span
    tl.store(acc_ptr + out * D + offs_d, acc, mask=inside)
    tl.store(top_ptr + out, top)
    tl.store(sum_ptr + out, total)


@triton.jit
def _join_kernel(acc_ptr, top_ptr, sum_ptr, o_ptr, spans,
                 D: tl.constexpr, D_PAD: tl.constexpr, SPANS_PAD: tl.constexpr):  # fmt: skip
    """The output of one row and head from its spans' parts; zeros where all were empty."""
    at = tl.program_id(0).to(tl.int64)
    offs_d, span = tl.arange(0, D_PAD), tl.arange(0, SPANS_PAD)
    here = span < spans
    top = tl.load(top_ptr + at * spans + span, mask=here, other=float("-inf"))
    total = tl.load(sum_ptr + at * spans + span, mask=here, other=0.0)
    largest = tl.max(top, 0)
    weight = tl.where(top == float("-inf"), 0.0, tl.exp2(top - tl.where(largest == float("-inf"), 0.0, largest)))
    mask = here[:, None] & (offs_d < D)[None, :]
    acc = tl.load(acc_ptr + (at * spans + span)[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
    norm = tl.sum(total * weight, 0)
    o = tl.sum(acc * weight[:, None], 0) / tl.where(norm > 0, norm, 1.0)
    tl.store(o_ptr + at * D + offs_d, o.to(o_ptr.dtype.element_ty), mask=offs_d < D)


def decode_attention(q, k, v, keys, values, first, position, start, window=None, chosen=None):
    """As `decode_attention_reference`, for keys, values, k and v of one type."""
    b, heads, d = q.shape
    q, k, v = (t if t.stride()[1:] == (d, 1) else t.contiguous() for t in (q, k, v))
    if keys.stride() != values.stride() or keys.stride(3) != 1:
        raise ValueError(
            f"decode_attention: keys {keys.stride()} and values {values.stride()} must have the same strides"
        )
    spans = triton.cdiv(keys.shape[1] if window is None else window, SPAN)
    out = torch.empty((b, heads, d), device=q.device, dtype=q.dtype)
    acc = torch.empty((b, heads, spans, d), device=q.device, dtype=torch.float32)
    top, total = torch.empty((2, b, heads, spans), device=q.device, dtype=torch.float32)
    d_pad = triton.next_power_of_2(d)
    _span_kernel[(heads, spans, b)](
        q, k, v, keys, values, position, start, first, chosen if chosen is not None else start, acc, top, total,
        q.stride(0), k.stride(0), v.stride(0), keys.stride(0), keys.stride(1), keys.stride(2), start.stride(0),
        chosen.stride(0) if chosen is not None else 0, window or 0, heads, d**-0.5 * LOG2E,
        GROUP=heads // keys.shape[2], D=d, D_PAD=d_pad, WINDOWED=window is not None, CHOSEN=chosen is not None,
        SPAN=SPAN, BLOCK=64, num_warps=4,
    )  # fmt: skip
    _join_kernel[(b * heads,)](
        acc, top, total, out, spans, D=d, D_PAD=d_pad, SPANS_PAD=triton.next_power_of_2(spans), num_warps=4
    )
    return out


@triton.jit
def _conv_kernel(tail_ptr, x_ptr, weight_ptr, bias_ptr, y_ptr, stride_row, stride_token, stride_x, n_channels,
                 WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """y = silu(bias + weight (tail, x)) and the tail moved on by x, for BLOCK channels of one row."""
    channels, row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1).to(tl.int64)
    inside = channels < n_channels
    newest = tail_ptr + row * stride_row + (WIDTH - 2) * stride_token + channels
    weight = weight_ptr + channels * WIDTH + WIDTH - 1
    x0 = tl.load(x_ptr + row * stride_x + channels, mask=inside, other=0.0).to(tl.float32)
    x1 = tl.load(newest, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(newest - stride_token, mask=inside & (WIDTH > 2), other=0.0).to(tl.float32)
    x3 = tl.load(newest - 2 * stride_token, mask=inside & (WIDTH > 3), other=0.0).to(tl.float32)
    u = tl.load(weight, mask=inside, other=0.0).to(tl.float32) * x0
    u += tl.load(weight - 1, mask=inside, other=0.0).to(tl.float32) * x1
    u += tl.load(weight - 2, mask=inside & (WIDTH > 2), other=0.0).to(tl.float32) * x2
    u += tl.load(weight - 3, mask=inside & (WIDTH > 3), other=0.0).to(tl.float32) * x3
    if HAS_BIAS:
        u += tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * n_channels + channels, (u / (1 + tl.exp(-u))).to(y_ptr.dtype.element_ty), mask=inside)
    tl.debug_barrier()  # another thread of this program may have read what this one overwrites
    tl.store(newest, x0.to(tail_ptr.dtype.element_ty), mask=inside)
    tl.store(newest - stride_token, x1.to(tail_ptr.dtype.element_ty), mask=inside & (WIDTH > 2))
    tl.store(newest - 2 * stride_token, x2.to(tail_ptr.dtype.element_ty), mask=inside & (WIDTH > 3))


def conv_update(tail, x, weight, bias=None):
    """As `conv_update_reference`, for widths of 2 to 4; x may be columns of a wider tensor, the tail some tokens."""
    b, channels = x.shape
    if tail.stride(2) != 1:
        raise ValueError(f"conv_update: a tail with strides {tail.stride()} must have its channels side by side")
    x = x if x.stride(1) == 1 else x.contiguous()
    y = torch.empty((b, channels), device=x.device, dtype=x.dtype)
    _conv_kernel[(triton.cdiv(channels, 128), b)](
        tail, x, weight.contiguous(), bias.contiguous() if bias is not None else weight, y, tail.stride(0), tail.stride(1),
        x.stride(0), channels, WIDTH=weight.shape[1], HAS_BIAS=bias is not None, BLOCK=128, num_warps=4,
    )  # fmt: skip
    return y


@triton.jit
def _update_kernel(state_ptr, x_ptr, dt_ptr, bias_ptr, a_ptr, b_ptr, c_ptr, d_ptr, y_ptr, stride_x, stride_dt, stride_b,
                   stride_c, heads, GROUP: tl.constexpr, P: tl.constexpr, N: tl.constexpr, N_PAD: tl.constexpr,
                   BLOCK_P: tl.constexpr, HAS_D: tl.constexpr):  # fmt: skip
    """state <- exp(dt A) state + dt x B^T; y = state C + D x, for BLOCK_P channels of one head of one row.

    dt is the softplus of what was projected, with its bias; A = -exp(a).
    """
    at = tl.program_id(0).to(tl.int64)
    row, head = at // heads, at % heads
    offs_p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_n = tl.arange(0, N_PAD)
    in_p, in_n = offs_p < P, offs_n < N
    tile = state_ptr + at * P * N + offs_p[:, None] * N + offs_n[None, :]
    mask = in_p[:, None] & in_n[None, :]
    state = tl.load(tile, mask=mask, other=0.0)
    dt = softplus(tl.load(dt_ptr + row * stride_dt + head).to(tl.float32) + tl.load(bias_ptr + head).to(tl.float32))
    decay = tl.exp(-dt * tl.exp(tl.load(a_ptr + head).to(tl.float32)))
    x = tl.load(x_ptr + row * stride_x + head * P + offs_p, mask=in_p, other=0.0).to(tl.float32)
    group = head // GROUP
    b = tl.load(b_ptr + row * stride_b + group * N + offs_n, mask=in_n, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + row * stride_c + group * N + offs_n, mask=in_n, other=0.0).to(tl.float32)
    state = state * decay + (dt * x)[:, None] * b[None, :]
    tl.store(tile, state, mask=mask)
    y = tl.sum(state * c[None, :], 1)
    if HAS_D:
        y += tl.load(d_ptr + head).to(tl.float32) * x
    tl.store(y_ptr + at * P + offs_p, y.to(y_ptr.dtype.element_ty), mask=in_p)


def ssd_update(state, x, dt, dt_bias, A_log, B, C, D=None):
    """As `ssd_update_reference`, for a contiguous float32 state; x, dt, B and C may be columns of a wider tensor."""
    b, h, p, n = state.shape
    if not state.is_contiguous():
        raise ValueError(f"ssd_update: a state with strides {state.stride()} must be contiguous")
    x, B, C = (t if t.stride()[1:] == (t.shape[2], 1) else t.contiguous() for t in (x, B, C))
    dt = dt if dt.stride(1) == 1 else dt.contiguous()
    dt_bias, A_log, D = (None if t is None else t.contiguous() for t in (dt_bias, A_log, D))
    y = torch.empty((b, h, p), device=x.device, dtype=x.dtype)
    block_p = min(triton.next_power_of_2(p), 32)
    _update_kernel[(b * h, triton.cdiv(p, block_p))](
        state, x, dt, dt_bias, A_log, B, C, D, y, x.stride(0), dt.stride(0), B.stride(0), C.stride(0), h,
        GROUP=h // B.shape[1], P=p, N=n, N_PAD=triton.next_power_of_2(n), BLOCK_P=block_p, HAS_D=D is not None,
        num_warps=4,
    )  # fmt: skip
    return y
