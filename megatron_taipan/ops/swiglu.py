"""The product inside SwiGLU."""

import torch.nn.functional as F
from torch import Tensor


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise (arXiv 2002.05202)."""
    return F.silu(gate) * up
