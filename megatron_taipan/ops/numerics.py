"""The precision in which the references accumulate."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32, or unchanged if it is float64: the type for statistics, states and softmaxes."""
    return x if x.dtype == torch.float64 else x.float()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of `at_least_float32` for tensors of this one, where a new tensor is made."""
    return torch.float64 if dtype == torch.float64 else torch.float32
