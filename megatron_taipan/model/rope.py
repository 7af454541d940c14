"""Rotary position embedding (arXiv 2104.09864), in the half-split form of Llama."""

import torch
from torch import Tensor

from megatron_taipan.ops.numerics import at_least_float32


def rotate(x: Tensor, position: Tensor, theta: float) -> Tensor:
    """Turns each pair (x_i, x_{i + d/2}) by position * theta^(-2i/d).

    Args:
        x: [n, heads, d]; position: [n], counted within the document.
    """
    half = x.shape[-1] // 2
    wide = at_least_float32(x)
    exponent = torch.arange(half, device=x.device, dtype=wide.dtype) / half
    angle = position.to(wide.dtype)[:, None] * theta**-exponent  # [n, d/2]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b = wide[..., :half], wide[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
