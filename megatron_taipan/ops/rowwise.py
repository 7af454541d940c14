"""Helpers of kernels that work on tensors row by row."""

import torch


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x as [rows, d] with a contiguous last dimension, without a copy where its strides allow that."""
    flat = x.reshape(-1, x.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def row_warps(block: int) -> int:
    """Warps of a program with `block` elements of a row."""
    return min(16, max(1, block // 512))
