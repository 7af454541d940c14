"""The residual stream between two layers."""

from typing import NamedTuple

from torch import Tensor


class Stream(NamedTuple):
    """The residual stream, the last addition to which may be outstanding: its value is h + branch.

    A layer hands on what its last part computed and leaves the addition to the norm of the next layer, whose kernel
    reads the sum anyway (`StreamNorm`). `total` adds where no layer follows that runs together with this one:
    at the end of the network, of a CUDA graph, of a pipeline stage, of what is recomputed as one. A tuple for ZeRO-3's
    sake.
    """

    h: Tensor  # [b, l, d] or this rank's shard of its tokens, [b l / tp, d]
    branch: Tensor | None = None  # shaped as h, in the type that layers compute in

    def total(self) -> Tensor:
        """The stream's value, in h's type."""
        return self.h if self.branch is None else self.h + self.branch  # h's type is the wider one
