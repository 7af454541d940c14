"""The short causal convolution with SiLU in Triton, forward and backward, on tensors of any row stride.

A program walks over a run of tokens, with the inputs of the last ones (and, backward, the gradients before the SiLU) in
registers, so that everything is read once. A run within one document, as most are, does not ask which token is of which.
"""

import torch
import triton
import triton.language as tl

from megatron_taipan.ops.column_sums_triton import weight_and_bias_sums

MAX_WIDTH = 4


@triton.jit
def _weight(weight_ptr, channels, lag, n_channels, WIDTH: tl.constexpr):
    """The weight that meets x[t - lag], one per channel; 0 for lags beyond the width."""
    at = weight_ptr + channels * WIDTH + (WIDTH - 1 - lag)
    return tl.load(at, mask=(channels < n_channels) & (lag < WIDTH), other=0.0).to(tl.float32)


@triton.jit
def _weights(weight_ptr, channels, n_channels, WIDTH: tl.constexpr):
    """Those of the token itself and of the three before it."""
    w0 = _weight(weight_ptr, channels, 0, n_channels, WIDTH)
    w1 = _weight(weight_ptr, channels, 1, n_channels, WIDTH)
    w2 = _weight(weight_ptr, channels, 2, n_channels, WIDTH)
    w3 = _weight(weight_ptr, channels, 3, n_channels, WIDTH)
    return w0, w1, w2, w3


@triton.jit
def _sigmoid(u):
    """1 / (1 + exp(-u)); a reciprocal root and its square are five instructions fewer than a quotient."""
    root = tl.rsqrt(1 + tl.exp(-u))
    return root * root


@triton.jit
def _bias(bias_ptr, channels, n_channels, CHANNELS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """The bias of each channel, 0 where there is none."""
    bias = tl.zeros([CHANNELS], tl.float32)
    if HAS_BIAS:
        bias += tl.load(bias_ptr + channels, mask=channels < n_channels, other=0.0).to(tl.float32)
    return bias


@triton.jit
def _of_one_document(seq_ptr, row, first, last, length):
    """Whether the tokens first..last of a row, as far as they exist, are of one document: numbers never fall."""
    base = seq_ptr + row * length
    return tl.load(base + tl.maximum(first, 0)) == tl.load(base + tl.minimum(last, length - 1))


@triton.jit
def _row(x_ptr, tail_ptr, seq_ptr, row, token, channels, length, stop, n_channels, x_b, x_l, inside,
         WIDTH: tl.constexpr, HAS_TAIL: tl.constexpr, HAS_SEQ: tl.constexpr):  # fmt: skip
    """(x[token] as float32, 0 from `stop` on; its document). Before the start: tail or zeros, of the first document."""
    x = tl.load(x_ptr + row * x_b + token.to(tl.int64) * x_l + channels,
                mask=inside & (token >= 0) & (token < stop), other=0.0).to(tl.float32)  # fmt: skip
    if HAS_TAIL:
        at = (row * (WIDTH - 1) + WIDTH - 1 + token) * n_channels + channels
        x += tl.load(tail_ptr + at, mask=inside & (token < 0) & (token >= 1 - WIDTH), other=0.0).to(tl.float32)
    document = 0
    if HAS_SEQ:
        document = tl.load(seq_ptr + row * length + tl.minimum(tl.maximum(token, 0), length - 1))
    return x, document


@triton.jit
def _three_before(x_ptr, tail_ptr, seq_ptr, row, begin, channels, length, n_channels, x_b, x_l, inside,
                  WIDTH: tl.constexpr, HAS_TAIL: tl.constexpr, HAS_SEQ: tl.constexpr):  # fmt: skip
    """The inputs of the three tokens before a run, the nearest first, and their documents."""
    x1, s1 = _row(x_ptr, tail_ptr, seq_ptr, row, begin - 1, channels, length, length, n_channels, x_b, x_l, inside, WIDTH,
                  HAS_TAIL, HAS_SEQ)  # fmt: skip
    x2, s2 = _row(x_ptr, tail_ptr, seq_ptr, row, begin - 2, channels, length, length, n_channels, x_b, x_l, inside, WIDTH,
                  HAS_TAIL, HAS_SEQ)  # fmt: skip
    x3, s3 = _row(x_ptr, tail_ptr, seq_ptr, row, begin - 3, channels, length, length, n_channels, x_b, x_l, inside, WIDTH,
                  HAS_TAIL, HAS_SEQ)  # fmt: skip
    return x1, x2, x3, s1, s2, s3


@triton.jit
def _four_from(x_ptr, tail_ptr, seq_ptr, row, token, channels, length, stop, n_channels, x_b, x_l, inside,
               WIDTH: tl.constexpr, HAS_SEQ: tl.constexpr):  # fmt: skip
    """The inputs of four tokens, and their documents: four loads are under way before the first use."""
    xa, sa = _row(x_ptr, tail_ptr, seq_ptr, row, token + 0, channels, length, stop, n_channels, x_b, x_l, inside, WIDTH,
                  False, HAS_SEQ)  # fmt: skip
    xb, sb = _row(x_ptr, tail_ptr, seq_ptr, row, token + 1, channels, length, stop, n_channels, x_b, x_l, inside, WIDTH,
                  False, HAS_SEQ)  # fmt: skip
    xc, sc = _row(x_ptr, tail_ptr, seq_ptr, row, token + 2, channels, length, stop, n_channels, x_b, x_l, inside, WIDTH,
                  False, HAS_SEQ)  # fmt: skip
    xd, sd = _row(x_ptr, tail_ptr, seq_ptr, row, token + 3, channels, length, stop, n_channels, x_b, x_l, inside, WIDTH,
                  False, HAS_SEQ)  # fmt: skip
    return xa, xb, xc, xd, sa, sb, sc, sd


@triton.jit
def _forward_kernel(x_ptr, weight_ptr, bias_ptr, seq_ptr, tail_ptr, y_ptr, length, n_channels, x_b, x_l,
                    WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, HAS_BIAS: tl.constexpr,
                    HAS_SEQ: tl.constexpr, HAS_TAIL: tl.constexpr):  # fmt: skip
    """y of TOKENS tokens."""
    begin, row = tl.program_id(1) * TOKENS, tl.program_id(2).to(tl.int64)
    one = True
    if HAS_SEQ:
        one = _of_one_document(seq_ptr, row, begin - 3, begin + TOKENS - 1, length)
    if one:
        _forward_run(x_ptr, weight_ptr, bias_ptr, seq_ptr, tail_ptr, y_ptr, length, n_channels, x_b, x_l, WIDTH, TOKENS,
                     CHANNELS, HAS_BIAS, False, HAS_TAIL)  # fmt: skip
    else:
        _forward_run(x_ptr, weight_ptr, bias_ptr, seq_ptr, tail_ptr, y_ptr, length, n_channels, x_b, x_l, WIDTH, TOKENS,
                     CHANNELS, HAS_BIAS, HAS_SEQ, HAS_TAIL)  # fmt: skip


@triton.jit
def _forward_run(x_ptr, weight_ptr, bias_ptr, seq_ptr, tail_ptr, y_ptr, length, n_channels, x_b, x_l,
                 WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, HAS_BIAS: tl.constexpr,
                 HAS_SEQ: tl.constexpr, HAS_TAIL: tl.constexpr):  # fmt: skip
    """Four tokens at a time; in a name, 0 is the newest token."""
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    begin, row = tl.program_id(1) * TOKENS, tl.program_id(2).to(tl.int64)
    inside = channels < n_channels
    w0, w1, w2, w3 = _weights(weight_ptr, channels, n_channels, WIDTH)
    bias = _bias(bias_ptr, channels, n_channels, CHANNELS, HAS_BIAS)
    x1, x2, x3, s1, s2, s3 = _three_before(x_ptr, tail_ptr, seq_ptr, row, begin, channels, length, n_channels, x_b, x_l,
                                           inside, WIDTH, HAS_TAIL, HAS_SEQ)  # fmt: skip
    end = tl.minimum(begin + TOKENS, length)
    for i in tl.range(0, TOKENS, 4):
        token = begin + i
        xa, xb, xc, xd, sa, sb, sc, sd = _four_from(x_ptr, tail_ptr, seq_ptr, row, token, channels, length, end,
                                                    n_channels, x_b, x_l, inside, WIDTH, HAS_SEQ)  # fmt: skip
        xs, documents = (xa, xb, xc, xd), (sa, sb, sc, sd)
        for j in tl.static_range(4):
            x0, s0 = xs[j], documents[j]
            u = bias + w0 * x0
            if HAS_SEQ:  # inputs of another document are cut off
                u += (
                    tl.where(s1 == s0, w1 * x1, 0.0)
                    + tl.where(s2 == s0, w2 * x2, 0.0)
                    + tl.where(s3 == s0, w3 * x3, 0.0)
                )
            else:
                u += w1 * x1 + w2 * x2 + w3 * x3
            y = u * _sigmoid(u)
            tl.store(y_ptr + (row * length + token + j) * n_channels + channels, y.to(y_ptr.dtype.element_ty),
                     mask=inside & (token + j < end))  # fmt: skip
            x3, x2, x1 = x2, x1, x0
            if HAS_SEQ:
                s3, s2, s1 = s2, s1, s0


@triton.jit
def _backward_kernel(x_ptr, weight_ptr, bias_ptr, seq_ptr, tail_ptr, dy_ptr, dx_ptr, dtail_ptr, sums_ptr, length,
                     n_channels, x_b, x_l, dy_b, dy_l, dx_b, dx_l,
                     WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, HAS_BIAS: tl.constexpr,
                     HAS_SEQ: tl.constexpr, HAS_TAIL: tl.constexpr, TAIL_GRADIENT: tl.constexpr):  # fmt: skip
    """dx of TOKENS tokens, and their part of the gradients of weight and bias: sums [runs, width + 1, channels] float32.

    The first run also walks over the tail's (TAIL_GRADIENT: written to dtail [b, width - 1, channels]).
    """
    begin, row = tl.program_id(1) * TOKENS, tl.program_id(2).to(tl.int64)
    one = True
    if HAS_SEQ:
        one = _of_one_document(seq_ptr, row, begin - 3, begin + TOKENS + 2, length)
    if one:
        _backward_run(x_ptr, weight_ptr, bias_ptr, seq_ptr, tail_ptr, dy_ptr, dx_ptr, dtail_ptr, sums_ptr, length,
                      n_channels, x_b, x_l, dy_b, dy_l, dx_b, dx_l, WIDTH, TOKENS, CHANNELS, HAS_BIAS, False, HAS_TAIL,
                      TAIL_GRADIENT)  # fmt: skip
    else:
        _backward_run(x_ptr, weight_ptr, bias_ptr, seq_ptr, tail_ptr, dy_ptr, dx_ptr, dtail_ptr, sums_ptr, length,
                      n_channels, x_b, x_l, dy_b, dy_l, dx_b, dx_l, WIDTH, TOKENS, CHANNELS, HAS_BIAS, HAS_SEQ, HAS_TAIL,
                      TAIL_GRADIENT)  # fmt: skip


@triton.jit
def _backward_run(x_ptr, weight_ptr, bias_ptr, seq_ptr, tail_ptr, dy_ptr, dx_ptr, dtail_ptr, sums_ptr, length,
                  n_channels, x_b, x_l, dy_b, dy_l, dx_b, dx_l,
                  WIDTH: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr, HAS_BIAS: tl.constexpr,
                  HAS_SEQ: tl.constexpr, HAS_TAIL: tl.constexpr, TAIL_GRADIENT: tl.constexpr):  # fmt: skip
    """Four tokens at a time; in a name, 0 is the newest token, 3 the oldest. Three tokens past the run are walked for
    their gradients."""
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    begin = tl.program_id(1) * TOKENS
    row = tl.program_id(2).to(tl.int64)
    inside = channels < n_channels
    w0, w1, w2, w3 = _weights(weight_ptr, channels, n_channels, WIDTH)
    bias = _bias(bias_ptr, channels, n_channels, CHANNELS, HAS_BIAS)
    x1, x2, x3, s1, s2, s3 = _three_before(x_ptr, tail_ptr, seq_ptr, row, begin, channels, length, n_channels, x_b, x_l,
                                           inside, WIDTH, HAS_TAIL, HAS_SEQ)  # fmt: skip
    zero = tl.zeros([CHANNELS], tl.float32)
    # Three different zeros: Triton 3.6 takes rotating loop variables with one common start for constants.
    d1, d2, d3 = w1 * 0.0, w2 * 0.0, w3 * 0.0
    g0, g1, g2, g3, gb = zero, zero, zero, zero, zero
    end = tl.minimum(begin + TOKENS, length)
    stop = tl.minimum(begin + TOKENS + 3, length)  # past the end counts as zero
    for i in tl.range(0, TOKENS + 4, 4):  # four tokens at once, so that eight loads are under way before the first use
        token = begin + i
        xa, xb, xc, xd, sa, sb, sc, sd = _four_from(x_ptr, tail_ptr, seq_ptr, row, token, channels, length, stop,
                                                    n_channels, x_b, x_l, inside, WIDTH, HAS_SEQ)  # fmt: skip
        at = dy_ptr + row * dy_b + token.to(tl.int64) * dy_l + channels
        dy_a = tl.load(at + 0 * dy_l, mask=inside & (token + 0 < stop), other=0.0)
        dy_b_ = tl.load(at + 1 * dy_l, mask=inside & (token + 1 < stop), other=0.0)
        dy_c = tl.load(at + 2 * dy_l, mask=inside & (token + 2 < stop), other=0.0)
        dy_d = tl.load(at + 3 * dy_l, mask=inside & (token + 3 < stop), other=0.0)
        xs, dys, documents = (xa, xb, xc, xd), (dy_a, dy_b_, dy_c, dy_d), (sa, sb, sc, sd)
        for j in tl.static_range(4):
            x0, s0 = xs[j], documents[j]
            if HAS_SEQ:  # inputs of another document are cut off
                y1, y2, y3 = tl.where(s1 == s0, x1, 0.0), tl.where(s2 == s0, x2, 0.0), tl.where(s3 == s0, x3, 0.0)
            else:
                y1, y2, y3 = x1, x2, x3
            u = bias + w0 * x0 + w1 * y1 + w2 * y2 + w3 * y3
            s = _sigmoid(u)
            d0 = dys[j].to(tl.float32) * (s + s * (u - u * s))  # 0 past the end
            own = tl.where(i < TOKENS, d0, 0.0)
            g0 += own * x0
            g1 += own * y1
            g2 += own * y2
            g3 += own * y3
            gb += own
            dx = w0 * d3
            if HAS_SEQ:
                dx += tl.where(s2 == s3, w1 * d2, 0.0) + tl.where(s1 == s3, w2 * d1, 0.0)
                dx += tl.where(s0 == s3, w3 * d0, 0.0)
            else:
                dx += w1 * d2 + w2 * d1 + w3 * d0
            done = token + j - 3
            tl.store(dx_ptr + row * dx_b + done.to(tl.int64) * dx_l + channels, dx.to(dx_ptr.dtype.element_ty),
                     mask=inside & (done >= begin) & (done < end))  # fmt: skip
            if TAIL_GRADIENT:
                at_tail = (row * (WIDTH - 1) + WIDTH - 1 + done) * n_channels + channels
                tl.store(dtail_ptr + at_tail, dx.to(dtail_ptr.dtype.element_ty),
                         mask=inside & (done < 0) & (done >= 1 - WIDTH))  # fmt: skip
            x3, x2, x1 = x2, x1, x0
            d3, d2, d1 = d2, d1, d0
            if HAS_SEQ:
                s3, s2, s1 = s2, s1, s0
    stretch = row * tl.num_programs(1) + tl.program_id(1)
    out = sums_ptr + stretch * (WIDTH + 1) * n_channels + channels
    tl.store(out + (WIDTH - 1) * n_channels, g0, mask=inside)
    tl.store(out + (WIDTH - 2) * n_channels, g1, mask=inside)
    if WIDTH > 2:
        tl.store(out + (WIDTH - 3) * n_channels, g2, mask=inside)
    if WIDTH > 3:
        tl.store(out + (WIDTH - 4) * n_channels, g3, mask=inside)
    tl.store(out + WIDTH * n_channels, gb, mask=inside)


def tokens_of_run(length: int, usual: int) -> int:
    """As usual, or as many times two as a row needs whose runs would pass the 65,535 of a grid's second dimension."""
    return usual * triton.next_power_of_2(max(1, triton.cdiv(triton.cdiv(length, usual), 65_535)))


def conv_forward(x, weight, bias, seq_idx, tail):
    """y [b, l, c] contiguous; x [b, l, c] of any strides but a contiguous last dimension."""
    b, l, c = x.shape
    y = torch.empty((b, l, c), dtype=x.dtype, device=x.device)
    tokens, channels = tokens_of_run(l, 64), 256
    _forward_kernel[(triton.cdiv(c, channels), triton.cdiv(l, tokens), b)](
        x, weight, bias if bias is not None else weight, seq_idx if seq_idx is not None else weight,
        tail if tail is not None else weight, y, l, c, x.stride(0), x.stride(1), WIDTH=weight.shape[1], TOKENS=tokens,
        CHANNELS=channels, HAS_BIAS=bias is not None, HAS_SEQ=seq_idx is not None, HAS_TAIL=tail is not None,
        num_warps=2,
    )  # fmt: skip
    return y


def conv_backward(dy, x, weight, bias, seq_idx, tail, dx):
    """Writes dx [b, l, c] (any strides, last one 1) in place; returns the gradients of weight and bias."""
    return weight_and_bias_sums(_launch_backward(dy, x, weight, bias, seq_idx, tail, dx, None), weight.dtype)


def conv_tail_gradient(dy, x, weight, bias, seq_idx, tail):
    """The gradient of tail [b, width - 1, c], in its dtype; only the first width - 1 tokens are read."""
    reach = tail.shape[1]
    dy, x = dy[:, :reach], x[:, :reach]
    seq_idx = seq_idx[:, :reach].contiguous() if seq_idx is not None else None
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)  # of too few tokens to be right
    dtail = torch.empty_like(tail)
    _launch_backward(dy, x, weight, bias, seq_idx, tail, dx, dtail)
    return dtail


def _launch_backward(dy, x, weight, bias, seq_idx, tail, dx, dtail):
    """Writes dx, and dtail where it is given; the runs' parts of the gradients of weight and bias."""
    b, l, c = x.shape
    width = weight.shape[1]
    tokens, channels = tokens_of_run(l, 128), 256
    runs = triton.cdiv(l, tokens)
    sums = torch.empty((b * runs, width + 1, c), dtype=torch.float32, device=x.device)
    _backward_kernel[(triton.cdiv(c, channels), runs, b)](
        x, weight, bias if bias is not None else weight, seq_idx if seq_idx is not None else weight,
        tail if tail is not None else weight, dy, dx, dtail if dtail is not None else weight, sums, l, c, x.stride(0),
        x.stride(1), dy.stride(0), dy.stride(1), dx.stride(0), dx.stride(1), WIDTH=width, TOKENS=tokens,
        CHANNELS=channels, HAS_BIAS=bias is not None, HAS_SEQ=seq_idx is not None, HAS_TAIL=tail is not None,
        TAIL_GRADIENT=dtail is not None, num_warps=4,
    )  # fmt: skip
    return sums


@torch.library.custom_op("megatron_taipan::causal_conv1d_forward", mutates_args=())
def _forward_op(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, seq_idx: torch.Tensor | None,
    tail: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    return conv_forward(x, weight, bias, seq_idx, tail)


@_forward_op.register_fake
def _(x, weight, bias, seq_idx, tail):
    return x.new_empty(x.shape)


@torch.library.custom_op("megatron_taipan::causal_conv1d_backward", mutates_args=())
def _backward_op(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, seq_idx: torch.Tensor | None,
    tail: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dweight, dbias = conv_backward(dy, x, weight, bias, seq_idx, tail, dx)
    return dx, dweight, dbias


@_backward_op.register_fake
def _(dy, x, weight, bias, seq_idx, tail):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0])


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    x, weight, bias, seq_idx, tail = ctx.saved_tensors
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    dx, dweight, dbias = _backward_op(dy, x, weight, bias, seq_idx, tail)
    return dx, dweight, dbias.to(bias.dtype) if bias is not None else None, None, None


_forward_op.register_autograd(_backward, setup_context=_save)


def causal_conv1d(x, weight, bias=None, *, seq_idx=None, initial_tail=None, return_tail=False):
    """Arguments and results as `causal_conv1d_reference`, width at most 4; no gradient flows to `initial_tail`."""
    width = weight.shape[1]
    if width > MAX_WIDTH:
        raise ValueError(f"causal_conv1d: width {width} is above the kernel's {MAX_WIDTH}")
    x = x if x.stride(-1) == 1 else x.contiguous()
    seq_idx = seq_idx.int().contiguous() if seq_idx is not None else None
    tail = initial_tail.detach().contiguous() if initial_tail is not None else None
    bias = bias.contiguous() if bias is not None else None
    y = _forward_op(x, weight.contiguous(), bias, seq_idx, tail)
    if not return_tail:
        return y
    b, l, c = x.shape
    before = tail.to(x.dtype) if tail is not None else x.new_zeros(b, width - 1, c)
    ending = torch.cat([before, x[:, -(width - 1) :]], 1)[:, -(width - 1) :]
    if seq_idx is not None:
        documents = torch.cat([seq_idx[:, :1].expand(b, width - 1), seq_idx[:, -(width - 1) :]], 1)[:, -(width - 1) :]
        ending = torch.where((documents == seq_idx[:, -1:])[..., None], ending, 0)
    return y, ending
