"""Many small copies in few launches."""

from collections.abc import Sequence

import torch
from torch import Tensor


def copy_all(to: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """to[i] = tensors[i], of equal shapes; one launch for all tensors with the same pair of types.

    Raises:
        ValueError: the lists have different lengths.
    """
    by_types: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for i, (a, b) in enumerate(zip(to, tensors, strict=True)):
        by_types.setdefault((a.dtype, b.dtype), []).append(i)
    for which in by_types.values():
        torch._foreach_copy_([to[i] for i in which], [tensors[i] for i in which])
