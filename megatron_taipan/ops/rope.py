"""Rotary position embedding (arXiv 2104.09864), in the half-split form of Llama."""

import torch
from torch import Tensor

from megatron_taipan.ops.numerics import at_least_float32, wide_dtype


def rotary_tables(position: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [n, width / 2] of position * theta^(-2i/width), in float32 (float64 for float64 operands).

    Args:
        position: [n], counted within the document; width: of a head; dtype: of what will be rotated.
    """
    half, wide = width // 2, wide_dtype(dtype)
    exponent = torch.arange(half, device=position.device, dtype=wide) / half
    angle = position.to(wide)[:, None] * theta**-exponent
    return angle.cos(), angle.sin()


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns each pair (x_i, x_{i + d/2}) by its angle; no gradient flows to the tables.

    Args:
        x: [n, heads, d]; cos, sin: [n, d/2], see `rotary_tables`.

    Returns:
        [n, heads, d] in x's dtype.
    """
    half = x.shape[-1] // 2
    wide = at_least_float32(x)
    cos, sin = cos[:, None], sin[:, None]
    a, b = wide[..., :half], wide[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
