"""The gate's noise: a counter-based hash, so that it is the same in every layout, split, recomputation and resume.

The generator is the finaliser of splitmix64 (Steele, Lea and Flood 2014), applied to each counter in turn, in
wrapping int64 arithmetic: bit-equal on every device.
"""

import torch
from torch import Tensor

_GOLDEN = -0x61C8864680B583EB  # 2^64 / golden ratio, as int64
_MIX = (-0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)
_DRAWS = 2  # one Gumbel variable a class


def gumbel_noise(seed: int, step: int | Tensor, samples: Tensor, position: Tensor, layer: int) -> Tensor:
    """Standard Gumbel variables -log(-log(u)) for both classes of the gate, u as in `uniform_noise`."""
    return -torch.log(-torch.log(uniform_noise(seed, step, samples, position, layer))).float()


def uniform_noise(seed: int, step: int | Tensor, samples: Tensor, position: Tensor, layer: int) -> Tensor:
    """Uniform variables in (0, 1), two for each token.

    Args:
        seed: of the run; step: optimizer step, an int or a 0-dim int64 tensor; layer: index of the layer.
        samples: [b] int64 index of each row's sample in the run.
        position: [l] or [b, l] int64 place of each token in its row.

    Returns:
        [b, l, 2] float64, never 0 or 1.
    """
    key = _mix(torch.full((), seed, dtype=torch.int64, device=samples.device))
    if not isinstance(step, Tensor):  # filled there; as_tensor would copy it from the host, and wait
        step = torch.full((), step, dtype=torch.int64, device=samples.device)
    key = _mix(key ^ step.to(samples.device, torch.int64))
    key = _mix(key ^ layer)
    key = _mix(key ^ samples.long())[:, None]  # [b, 1]
    counter = position.long()[..., None] * _DRAWS + torch.arange(_DRAWS, device=samples.device)  # [.., l, 2]
    bits = _mix(key[..., None] ^ counter)
    return ((bits >> 40 & 0xFFFFFF).double() + 0.5) / 2**24  # 24 bits


def _mix(x: Tensor) -> Tensor:
    """splitmix64: a bijection of 64-bit words in which every input bit flips every output bit half of the time."""
    x = x + _GOLDEN
    x = (x ^ _shift(x, 30)) * _MIX[0]
    x = (x ^ _shift(x, 27)) * _MIX[1]
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own keeps the sign)."""
    return x >> bits & ((1 << (64 - bits)) - 1)
