"""The SSD scan of Mamba-2 in Triton, forward and backward (arXiv 2405.21060, section 6).

Unlike the usual five-kernel form, the scan over chunks is serial inside one program per (row, head), the state stays in
registers, and everything that a chunk needs is done while its tiles are on the chip. So x, B and C are read once and y
is written once. Rows and heads fill the GPU (4 x 64 programs in the 1.3B preset); where they do not, the sequence is
split into segments whose incoming states are computed by a first, cheaper pass.

    forward    `_scan_kernel`      state in registers; keeps the (16-bit) state that enters each chunk for backward
    backward   `_reverse_kernel`   the same, from the end: the gradient of the state that leaves each chunk
               `_token_kernel`     all chunks at once: the gradient of x
               `_group_kernel`     all chunks at once: the gradients of B and C, which the heads of a group share; both
                                   kernels loop over the heads, so that what these share adds up in registers
               `_steps_kernel`     the gradients of dt, A, D from what the two left of each token

Notation in the kernels: c = position of the chunk; t, s = token in it as reader and as source; cum = running sum of
dt * A inside the chunk, times log2(e), so that every decay is one exp2. Documents (seq_idx) are independent: a pair (t,
s) counts where s is not before the start of t's document; what enters a chunk belongs to the document of the token
before it.
"""

import torch

from megatron_taipan.ops.ssd_backward_triton import scan_backward
from megatron_taipan.ops.ssd_forward_triton import prepare_decay, scan_forward, state_dtype
from megatron_taipan.ops.ssd_tiles import CHUNK


@torch.library.custom_op("megatron_taipan::ssd_forward", mutates_args=())
def _forward_op(
    x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor | None,
    seq_idx: torch.Tensor | None, initial_state: torch.Tensor | None, keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(y, final state, states that enter the chunks)."""
    decays = prepare_decay(dt, None, A, seq_idx)
    y, states, final = scan_forward(x, decays, B, C, D, initial_state, keep=int(keep))
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dx, ddt, dB, dC, gradients of A, D and dt's bias [3, h], dinitial)."""
    decays = prepare_decay(dt, None, A, seq_idx)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    ddt = torch.empty(dt.shape, dtype=dt.dtype, device=x.device)
    dB, dC = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (B, C))
    sums, dinitial = scan_backward(
        dy, x, decays, A, B, C, D, states, dfinal, dx=dx, ddt=ddt, dB=dB, dC=dC, softplus=False
    )
    return dx, ddt, dB, dC, sums, dinitial


@_backward_op.register_fake
def _(dy, dfinal, x, dt, A, B, C, D, seq_idx, states):
    b, _, h, p = x.shape
    state = x.new_empty((b, h, p, B.shape[-1]), dtype=torch.float32)
    new = torch.Tensor.new_empty
    return new(x, x.shape), new(dt, dt.shape), new(B, B.shape), new(C, C.shape), new(A, (3, h)), state


def _save(ctx, inputs, output):
    x, dt, A, B, C, D, seq_idx, initial_state, _keep = inputs
    ctx.set_materialize_grads(False)  # or autograd fills zeros as large as the kept states
    ctx.save_for_backward(x, dt, A, B, C, D, seq_idx, initial_state, output[2])


def _backward(ctx, dy, dfinal, _dstates):
    x, dt, A, B, C, D, seq_idx, initial_state, states = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy if dy.stride(-1) == 1 else dy.contiguous()
    dx, ddt, dB, dC, sums, dinitial = _backward_op(dy, dfinal, x, dt, A, B, C, D, seq_idx, states)
    dA, dD, _ = sums
    dinitial = dinitial.to(initial_state.dtype) if initial_state is not None else None
    return dx, ddt, dA, dB, dC, dD.to(D.dtype) if D is not None else None, None, dinitial, None


_forward_op.register_autograd(_backward, setup_context=_save)


def ssd(x, dt, A, B, C, *, chunk_size, D=None, seq_idx=None, initial_state=None, return_state=False):
    """The scan; arguments and results as `megatron_taipan.ops.ssd.ssd_reference`.

    chunk_size is the reference's; these kernels always work on `CHUNK` tokens, which changes speed, not results.
    """
    x, B, C = (t if t.stride(-1) == 1 else t.contiguous() for t in (x, B, C))
    seq_idx = seq_idx.int().contiguous() if seq_idx is not None else None
    D, initial_state = (t.contiguous() if t is not None else None for t in (D, initial_state))
    keep = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, dt, A, B, C, D, initial_state)
    )
    y, final, _ = _forward_op(x, dt, A.float().contiguous(), B, C, D, seq_idx, initial_state, keep)
    return (y, final) if return_state else y
