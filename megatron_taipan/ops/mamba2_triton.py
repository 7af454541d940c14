"""Everything of a Mamba-2 mixer between its two projections as one operation: conv, scan, gate and norm; and, where its
matrix is given, the output projection.

One operation instead of three, because then every kernel reads and writes its columns of the projections' own
[tokens, z x B C dt] layout: nothing is split, concatenated or copied, forward or backward.

It keeps little for the backward pass, which computes again, bit for bit, what is cheap: dt and its running sums; the
norm's output, which only the output projection's gradient needs, in the norm's backward kernel; and where the caller says so the
convolution's output and most of the states.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F

from megatron_taipan.ops.causal_conv1d_triton import conv_backward, conv_forward
from megatron_taipan.ops.gated_norm_triton import gated_backward, gated_forward
from megatron_taipan.ops.mamba2_piece import Piece, Place
from megatron_taipan.ops.rowwise import rows_of
from megatron_taipan.ops.ssd_backward_triton import scan_backward
from megatron_taipan.ops.ssd_forward_triton import prepare_decay, scan_forward, scan_states, state_dtype
from megatron_taipan.ops.ssd_tiles import CHUNK


def _columns(zxbcdt: torch.Tensor, heads: int, headdim: int, groups: int, d_state: int):
    """Views z, xBC, dt of the joint projection [b, l, ...]."""
    inner, states = heads * headdim, groups * d_state
    return zxbcdt.split([inner, inner + 2 * states, heads], -1)


def _split_conv(xBC: torch.Tensor, heads: int, headdim: int, groups: int, d_state: int):
    """Views x [b, l, h, p], B and C [b, l, g, n] of the convolution's output."""
    inner, states = heads * headdim, groups * d_state
    x, B, C = xBC.split([inner, states, states], -1)
    return x.unflatten(-1, (heads, headdim)), B.unflatten(-1, (groups, d_state)), C.unflatten(-1, (groups, d_state))


STATES_EVERY = 16  # chunks: an eighth of the bytes of all states, and enough programs to compute the others again


class Keep(NamedTuple):
    """What of a mixer lives from the forward to the backward pass, besides its inputs and y."""

    conv: bool  # the convolution's output
    every: int  # every so many chunks' entering state, with 1 in 16 bits, else in float32; 0: none


def _conv_and_scan(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, seq_idx, sizes, every, piece=None):
    """(xBC, states, y): what comes before the norm, all of it needed in the backward pass."""
    heads = A.shape[0]
    _, xBC, dt = _columns(zxbcdt, heads, *sizes)
    if piece is None:
        xBC = conv_forward(xBC, conv_weight, conv_bias, seq_idx, None)
    else:
        xBC = piece.conv_forward(xBC, conv_weight, conv_bias, seq_idx)
    x, B, C = _split_conv(xBC, heads, *sizes)
    enter = piece.enter if piece is not None else None
    y, states, _ = scan_forward(x, prepare_decay(dt, dt_bias, A, seq_idx), B, C, D, None, keep=every, enter=enter)
    return xBC, states, y


def _norm(y, zxbcdt, weight, eps, group_size, reduce_sum=None):
    """(out [b, l, d_inner], scale) of the gated norm of y [b, l, h, p]."""
    b, l, heads, headdim = y.shape
    z = zxbcdt[..., : heads * headdim]
    out, scale = gated_forward(y.view(b * l, -1), _flat(z), weight, eps, group_size, reduce_sum)
    return out.view(b, l, -1), scale


def _mix_backward(
    dout, zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, seq_idx, xBC, states, y, scale, sizes, every,
    piece=None, again=None, **spread,
):  # fmt: skip
    """Gradients of zxbcdt, conv_weight, conv_bias, (A, D, dt_bias) [3, heads] float32, norm_weight.

    xBC: None where it was not kept. piece: as the forward pass left it, where other ranks hold the rows' other pieces. again: [b * l, d_inner], where the norm's output is written once more.
    spread: more arguments of `gated_backward`, where groups are spread over ranks.
    """
    heads = A.shape[0]
    b, l, _ = zxbcdt.shape
    grads = torch.empty_like(zxbcdt)
    z, raw, dt = _columns(zxbcdt, heads, *sizes)
    dz, draw, ddt = _columns(grads, heads, *sizes)
    dy = torch.empty_like(y)
    dnorm = gated_backward(
        rows_of(dout), y.view(b * l, -1), _flat(z), norm_weight, scale, dy.view(b * l, -1), _flat(dz), again=again,
        **spread,
    )  # fmt: skip
    decays = prepare_decay(dt, dt_bias, A, seq_idx)
    if xBC is None:
        if piece is None:
            xBC = conv_forward(raw, conv_weight, conv_bias, seq_idx, None)
        else:
            xBC = piece.conv_again(raw, conv_weight, conv_bias, seq_idx)
    x, B, C = _split_conv(xBC, heads, *sizes)
    if every > 1:
        states = scan_states(x, decays, B, states, every)
    dxBC = torch.empty_like(xBC)
    dx, dB, dC = _split_conv(dxBC, heads, *sizes)
    sums, _ = scan_backward(
        dy, x, decays, A, B, C, D, states, None, dx=dx, ddt=ddt, dB=dB, dC=dC, softplus=True,
        leave=piece.leave if piece is not None else None,
    )  # fmt: skip
    if piece is None:
        dweight, dconv_bias = conv_backward(dxBC, raw, conv_weight, conv_bias, seq_idx, None, draw)
    else:
        dweight, dconv_bias = piece.conv_backward(dxBC, raw, conv_weight, conv_bias, seq_idx, draw)
    return grads, dweight, dconv_bias, sums, dnorm


def _flat(z: torch.Tensor) -> torch.Tensor:
    """[b, l, d] columns of a contiguous buffer as [b * l, d], a view."""
    return z.view(-1, z.shape[2])


@torch.library.custom_op("megatron_taipan::mamba2_mix_forward", mutates_args=())
def _forward_op(
    zxbcdt: torch.Tensor, conv_weight: torch.Tensor, conv_bias: torch.Tensor | None, dt_bias: torch.Tensor,
    A: torch.Tensor, D: torch.Tensor, norm_weight: torch.Tensor, seq_idx: torch.Tensor | None, headdim: int,
    groups: int, d_state: int, eps: float, group_size: int, every: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(out, then what the backward pass needs: xBC, states, y, scale)."""
    sizes = headdim, groups, d_state
    kept = _conv_and_scan(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, seq_idx, sizes, every)
    out, scale = _norm(kept[-1], zxbcdt, norm_weight, eps, group_size)
    return out, *kept, scale


@_forward_op.register_fake
def _(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, seq_idx, headdim, groups, d_state, eps, group_size, every):  # fmt: skip
    b, l, _ = zxbcdt.shape
    heads, chunks = A.shape[0], -(-l // CHUNK)
    inner = heads * headdim
    new = zxbcdt.new_empty
    states = new(
        (b, -(-chunks // every), heads, headdim, d_state) if every else (0,),
        dtype=torch.float32 if every > 1 else state_dtype(zxbcdt.dtype),
    )
    return (
        new((b, l, inner), dtype=norm_weight.dtype), new((b, l, inner + 2 * groups * d_state)), states,
        new((b, l, heads, headdim)), new((b * l, inner // group_size), dtype=torch.float32),
    )  # fmt: skip


@torch.library.custom_op("megatron_taipan::mamba2_mix_backward", mutates_args=())
def _backward_op(
    dout: torch.Tensor, zxbcdt: torch.Tensor, conv_weight: torch.Tensor, conv_bias: torch.Tensor | None,
    dt_bias: torch.Tensor, A: torch.Tensor, D: torch.Tensor, norm_weight: torch.Tensor, seq_idx: torch.Tensor | None,
    xBC: torch.Tensor | None, states: torch.Tensor, y: torch.Tensor, scale: torch.Tensor, headdim: int, groups: int,
    d_state: int, every: int, again: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """As `_mix_backward`, and the norm's output [b * l, d_inner] (empty unless again)."""
    b, l, heads, headdim = y.shape
    out = norm_weight.new_empty((b * l, heads * headdim) if again else (0,))
    gradients = _mix_backward(
        dout, zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, seq_idx, xBC, states, y, scale,
        (headdim, groups, d_state), every, again=out if again else None,
    )  # fmt: skip
    return *gradients, out


@_backward_op.register_fake
def _(dout, zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, seq_idx, xBC, states, y, scale, headdim, groups, d_state, every, again):  # fmt: skip
    b, l, heads, headdim = y.shape
    return (
        torch.empty_like(zxbcdt), conv_weight.new_empty(conv_weight.shape), conv_weight.new_empty(conv_weight.shape[0]),
        A.new_empty((3, A.shape[0])), norm_weight.new_empty(norm_weight.shape),
        norm_weight.new_empty((b * l, heads * headdim) if again else (0,)),
    )  # fmt: skip


class _Mix(torch.autograd.Function):
    """The operation where groups of the norm are on one rank, with the output projection where its matrix is given."""

    @staticmethod
    def forward(
        ctx, zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, out_weight, seq_idx, sizes, keep, eps, size
    ):  # fmt: skip
        inputs = zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, seq_idx
        out, xBC, states, y, scale = _forward_op(*inputs, *sizes, eps, size, keep.every)
        if keep.every:
            ctx.save_for_backward(*inputs, xBC if keep.conv else None, states, y, scale, out_weight)
        ctx.sizes, ctx.every = sizes, keep.every
        return out if out_weight is None else F.linear(out, out_weight)

    @staticmethod
    def backward(ctx, grad):
        *saved, out_weight = ctx.saved_tensors  # read once: under recomputation a second look is refused
        rows = grad.reshape(-1, grad.shape[-1])
        again = ctx.needs_input_grad[7]  # the projection's gradient needs the norm's output, its input
        dout = grad if out_weight is None else rows @ out_weight
        *gradients, out = _backward_op(dout, *saved, *ctx.sizes, ctx.every, again)
        return *_in_order(gradients, saved), rows.t() @ out if again else None, *[None] * 5


def _in_order(gradients, saved):
    """What `_mix_backward` gives as the gradients of zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight."""
    grads, dweight, dconv_bias, (dA, dD, dbias), dnorm = gradients
    conv_bias, dt_bias, D = saved[2], saved[3], saved[5]
    dconv_bias = dconv_bias.to(conv_bias.dtype) if conv_bias is not None else None
    return grads, dweight, dconv_bias, dbias.to(dt_bias.dtype), dA, dD.to(D.dtype), dnorm


class _MixOverRanks(torch.autograd.Function):
    """The operation where other ranks hold parts of the norm's groups, or the rows' other pieces.

    Not a custom op, since it calls Python functions.
    """

    @staticmethod
    def forward(ctx, zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, seq_idx, known, sizes, keep, eps,
                group_size, reduce_sum, place):  # fmt: skip
        piece = Piece(place, known) if place is not None else None
        inputs = zxbcdt, conv_weight, conv_bias, dt_bias, A, D
        xBC, states, y = _conv_and_scan(*inputs, seq_idx, sizes, keep.every, piece)
        out, scale = _norm(y, zxbcdt, norm_weight, eps, group_size, reduce_sum)
        border = (known, piece.tail, piece.later) if piece is not None else (None, None, None)
        spread_out = out if reduce_sum is not None else None
        kept_xBC = xBC if keep.conv else None
        if keep.every:
            ctx.save_for_backward(
                *inputs, norm_weight, seq_idx, kept_xBC, states, y, scale, spread_out, *border
            )  # fmt: skip
        ctx.sizes, ctx.every, ctx.place = sizes, keep.every, place
        ctx.spread = {"group_size": group_size, "reduce_sum": reduce_sum} if reduce_sum is not None else {}
        return out

    @staticmethod
    def backward(ctx, dout):
        *saved, out, known, tail, later = ctx.saved_tensors  # read once: under recomputation a second look is refused
        piece = Piece(ctx.place, known, tail, later) if ctx.place is not None else None
        spread = {"out": out.flatten(0, 1), **ctx.spread} if out is not None else {}
        gradients = _mix_backward(dout, *saved, ctx.sizes, ctx.every, piece, **spread)
        return *_in_order(gradients, saved), *[None] * 8


def mamba2_mix(
    zxbcdt: torch.Tensor,
    conv_weight: torch.Tensor,
    conv_bias: torch.Tensor | None,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    norm_weight: torch.Tensor,
    *,
    seq_idx: torch.Tensor | None,
    headdim: int,
    groups: int,
    d_state: int,
    group_size: int,
    eps: float,
    reduce_sum: Callable[[torch.Tensor], torch.Tensor] | None = None,
    place: Place | None = None,
    known: torch.Tensor | None = None,
    out_weight: torch.Tensor | None = None,
    recompute: Collection[str] = (),
) -> torch.Tensor:
    """gated_rms_norm(ssd(silu(conv(xBC)), softplus(dt + dt_bias)), z), from an empty state.

    Args:
        zxbcdt: [b, l, d_inner + (d_inner + 2 groups d_state) + heads], the joint projection, contiguous.
        conv_weight: [d_inner + 2 groups d_state, width]; conv_bias the same without width.
        dt_bias, A, D: [heads] float32, A negative; norm_weight: [d_inner].
        seq_idx: [b, l] int32 document of each token, or None.
        group_size: channels under one norm, over all ranks.
        reduce_sum: where a group is spread over ranks, as for `gated_rms_norm`; else None.
        place: where the rows are pieces of longer ones, this rank among those that hold the others; all call this.
        known: [b, width - 1] bool then, which of the tokens just before the piece are of its first token's document.
            Convolution and scan go on from these.
        out_weight: [d, d_inner] of the output projection, or None; not together with reduce_sum or place.
        recompute: what is not kept for the backward pass but computed again there: "conv", the convolution's output;
            "states", all but every STATES_EVERY-th of those that enter chunks.

    Returns:
        [b, l, d_inner] in norm_weight's dtype, the input of the output projection; with out_weight that times its
        transpose, [b, l, d].
    """
    inputs = (zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, out_weight)
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    keep = Keep("conv" not in recompute, (STATES_EVERY if "states" in recompute else 1) if needed else 0)
    seq_idx = seq_idx.int().contiguous() if seq_idx is not None else None
    tensors = (zxbcdt, conv_weight, conv_bias, dt_bias, A.float(), D, norm_weight)
    ready = (*(t.contiguous() if t is not None else None for t in tensors), seq_idx)
    sizes = (headdim, groups, d_state)
    if reduce_sum is None and place is None:
        return _Mix.apply(*ready[:-1], out_weight, seq_idx, sizes, keep, eps, group_size)
    return _MixOverRanks.apply(*ready, known, sizes, keep, eps, group_size, reduce_sum, place)
