"""The scores of a selective layer's gate: its linear layer and its noise in one kernel, the gradients in another.

In plain torch the 16-bit input is copied to float32 and read again, each way, and the noise takes some eighty launches of
integers: 352 MB forward and 471 backward of a layer of the 1.3B model at 4 x 4096 tokens, where the input has 67.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 8  # tokens of a tile
CHUNK = 128  # tokens of a program of the backward pass: as many partial sums of the weight's gradient


@triton.jit
def _mix(x):
    """splitmix64, as in model/noise.py; shifts are logical."""
    x = x + (-0x61C8864680B583EB)
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * (-0x40A7B892E31B1A47)
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * (-0x6B2FB644ECCEEE15)
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def _gumbel(key, counter):
    """-log(-log(u)) of a uniform variable with 24 bits."""
    bits = (_mix(key ^ counter) >> 40) & 0xFFFFFF
    return (-tl.log(-tl.log((bits.to(tl.float64) + 0.5) / 16777216.0))).to(tl.float32)


@triton.jit(do_not_specialize=["seed", "layer", "offset"])
def _forward_kernel(u_ptr, weight_ptr, bias_ptr, logits_ptr, noise_ptr, step_ptr, samples_ptr, position_ptr, n, width, u_row,
                    length, position_row, offset, seed, layer, NOISE: tl.constexpr, ROWS: tl.constexpr,
                    BLOCK: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    real = rows < n
    at = tl.arange(0, BLOCK)
    out = tl.zeros([ROWS, BLOCK], tl.float32)
    chosen = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        inside = start + at < width
        u = tl.load(u_ptr + rows[:, None] * u_row + (start + at)[None, :], mask=real[:, None] & inside[None, :],
                    other=0.0).to(tl.float32)  # fmt: skip
        out += u * tl.load(weight_ptr + start + at, mask=inside, other=0.0)[None, :]
        chosen += u * tl.load(weight_ptr + width + start + at, mask=inside, other=0.0)[None, :]
    tl.store(logits_ptr + 2 * rows, tl.sum(out, 1) + tl.load(bias_ptr), mask=real)
    tl.store(logits_ptr + 2 * rows + 1, tl.sum(chosen, 1) + tl.load(bias_ptr + 1), mask=real)
    if NOISE:
        token = rows + offset
        row, place = token // length, token % length
        key = _mix(tl.zeros([ROWS], tl.int64) + seed)
        key = _mix(key ^ tl.load(step_ptr))
        key = _mix(key ^ layer)
        key = _mix(key ^ tl.load(samples_ptr + row, mask=real, other=0))
        counter = 2 * tl.load(position_ptr + row * position_row + place, mask=real, other=0)
        tl.store(noise_ptr + 2 * rows, _gumbel(key, counter), mask=real)
        tl.store(noise_ptr + 2 * rows + 1, _gumbel(key, counter + 1), mask=real)


@triton.jit
def _backward_kernel(u_ptr, weight_ptr, dlogits_ptr, du_ptr, parts_ptr, n, width, u_row, CHUNK: tl.constexpr, DU: tl.constexpr,
                     ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """du = dlogits weight where DU, and this chunk's part [2, width] of dlogits^T u."""
    chunk = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    of_out = tl.load(weight_ptr + at, mask=inside, other=0.0)
    of_chosen = tl.load(weight_ptr + width + at, mask=inside, other=0.0)
    out = tl.zeros([ROWS, BLOCK], tl.float32)
    chosen = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(0, CHUNK, ROWS):
        rows = chunk * CHUNK + tile + tl.arange(0, ROWS)
        real = rows < n
        d_out = tl.load(dlogits_ptr + 2 * rows, mask=real, other=0.0)[:, None]
        d_chosen = tl.load(dlogits_ptr + 2 * rows + 1, mask=real, other=0.0)[:, None]
        both = real[:, None] & inside[None, :]
        u = tl.load(u_ptr + rows[:, None] * u_row + at[None, :], mask=both, other=0.0).to(tl.float32)
        out += d_out * u
        chosen += d_chosen * u
        if DU:
            du = d_out * of_out[None, :] + d_chosen * of_chosen[None, :]
            tl.store(du_ptr + rows[:, None] * width + at[None, :], du.to(du_ptr.dtype.element_ty), mask=both)
    tl.store(parts_ptr + chunk * 2 * width + at, tl.sum(out, 0), mask=inside)
    tl.store(parts_ptr + chunk * 2 * width + width + at, tl.sum(chosen, 0), mask=inside)


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, weight, bias, counters):
        n, width = u.shape
        logits = torch.empty((n, 2), dtype=torch.float32, device=u.device)
        noise = torch.empty_like(logits) if counters else logits
        none = logits  # in the place of what no noise is made of
        step, samples, position, length, offset, seed, layer = counters or (none, none, none, 1, 0, 0, 0)
        position_row = position.stride(0) if position.dim() == 2 else 0
        if n:
            _forward_kernel[(triton.cdiv(n, ROWS),)](
                u, weight, bias, logits, noise, step, samples, position, n, width, u.stride(0), length, position_row,
                offset, seed, layer, NOISE=bool(counters), ROWS=ROWS, BLOCK=256, num_warps=4,
            )  # fmt: skip
        ctx.save_for_backward(u, weight)
        ctx.mark_non_differentiable(*([noise] if counters else []))
        return logits, noise if counters else None

    @staticmethod
    def backward(ctx, dlogits, _):
        u, weight = ctx.saved_tensors
        (n, width), dlogits = u.shape, dlogits.contiguous()
        wanted = ctx.needs_input_grad[0]
        chunks = triton.cdiv(n, CHUNK)
        parts = torch.empty((chunks, 2, width), dtype=torch.float32, device=u.device)
        du = torch.empty((n, width), dtype=u.dtype, device=u.device) if wanted else u
        if n:
            _backward_kernel[(chunks, triton.cdiv(width, 256))](
                u, weight, dlogits, du, parts, n, width, u.stride(0), CHUNK=CHUNK, DU=wanted, ROWS=ROWS, BLOCK=256,
                num_warps=4,
            )  # fmt: skip
        return du if wanted else None, parts.sum(0), dlogits.sum(0), None


def gate_scores(
    u: Tensor, weight: Tensor, bias: Tensor, *, seed: int = 0, step: int | Tensor = 0, samples: Tensor | None = None,
    position: Tensor | None = None, layer: int = 0, offset: int = 0,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """(u weight^T + bias, Gumbel noise of the same shape), as model/gate.py and model/noise.py define them.

    Args:
        u: [..., d] of any floating type up to 32 bits; weight: float32 [2, d]; bias: float32 [2].
        seed, step, samples, position, layer: as for `gumbel_noise`; without samples there is no noise.
        offset: u's first token among all of them, [b * l].

    Returns:
        float32 [..., 2] each, or no noise; sums are float32, in an order that never changes.
    """
    flat = u.reshape(-1, u.shape[-1])
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    counters = None
    if samples is not None:
        assert position is not None
        if not isinstance(step, Tensor):
            step = torch.full((), step, dtype=torch.int64, device=u.device)
        position = position.long()
        position = position if position.stride(-1) == 1 else position.contiguous()
        counters = (step.long(), samples.long().contiguous(), position, position.shape[-1], offset, seed, layer)
    logits, noise = _Scores.apply(flat, weight.contiguous(), bias.contiguous(), counters)
    shape = (*u.shape[:-1], 2)
    return logits.view(shape), None if noise is None else noise.view(shape)
