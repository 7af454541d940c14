"""Products and copies that touch only some rows of a token axis: those that a gate selected.

The number of selected rows is known on the device. The references below read it on the host and work on tensors of that
length; the kernels (selected_rows_triton.py) never do: their buffers are large enough for all rows and have the
selected ones in front, and each program reads the number on the device.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_taipan.ops.product import Weight, product


class Rows(NamedTuple):
    """Selected rows of an axis of n, in rising order."""

    at: Tensor  # [capacity] int64; entries from n_valid on are unused and 0
    n_valid: Tensor | None  # [1] int32, on the device; None: all entries are valid

    def intervals(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """The rows' entries of lo and hi [n], as [capacity]; lo > hi after the last row, where no key is visible."""
        lo, hi = lo[self.at], hi[self.at]
        if self.n_valid is None:
            return lo, hi
        real = torch.arange(len(self.at), device=lo.device) < self.n_valid
        return torch.where(real, lo, 1), torch.where(real, hi, 0)


def select_rows_reference(like: Tensor, selected: Tensor) -> Rows:
    """The rows where selected [n] is true; `like` is the tensor from which they will be taken.

    The length becomes known on the host, which has to wait for the GPU.
    """
    return Rows(selected.nonzero()[:, 0], None)


def gather_linear_reference(x: Tensor, weight: Weight, rows: Rows) -> Tensor:
    """x[rows] @ weight^T: [n, d], [e, d] -> [capacity, e]."""
    return product(x[rows.at], weight)


def bounded_linear_reference(x: Tensor, weight: Weight, rows: Rows) -> Tensor:
    """x @ weight^T of a buffer of selected rows: [capacity, d], [e, d] -> [capacity, e]."""
    return product(x, weight)


def scatter_rows_reference(x: Tensor, rows: Rows, n: int, onto: Tensor | None = None) -> Tensor:
    """The rows of a buffer [capacity, d] at their positions in [n, d].

    Args:
        onto: [n, d] what the other rows are, without a gradient; it stays as it is. None: zeros.
    """
    return (x.new_zeros(n, x.shape[1]) if onto is None else onto).index_put((rows.at,), x)
