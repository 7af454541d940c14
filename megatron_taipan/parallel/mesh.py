"""Which rank does what: one mesh with named axes, from which every group and every rank of a run comes.

    axis      ranks that differ along it hold
    pipeline  other layers
    data      other samples of the global batch
    context   other tokens of the same samples (parallel/context.py)
    tensor    other parts of the same matrices

Ranks count the last axis fastest, as in Megatron-LM and in DeepSpeed's PipeModelDataParallelTopology, so that a tensor
group stays within one host. Two numbers of a rank look alike while context is 1, and are different questions: which
samples it reads depends on `data` alone; which shard of ZeRO's state it holds depends on `data` and `context` together,
since all of these ranks hold the same parameters.

torch's DeviceMesh answers the same questions only where process groups are open (a dry run and a reshard have none),
joins two axes by a private method (`_flatten`), and opens a group for every axis, also the pipeline's, which DeepSpeed
opens itself.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from megatron_taipan.errors import UserError
from megatron_taipan.parallel_config import ParallelConfig


class Coordinates(NamedTuple):
    """A rank's number along each axis; the axes in order, the last one counts fastest."""

    pipeline: int = 0
    data: int = 0
    context: int = 0
    tensor: int = 0


AXES = Coordinates._fields
ZERO = ("data", "context")  # ranks along these hold the same parameters, and share the optimizer's state by ZeRO


@dataclass(frozen=True)
class Mesh:
    """Number of ranks along each axis. Methods that take `axes` mean them together, in the mesh's own order."""

    pipeline: int = 1
    data: int = 1
    context: int = 1
    tensor: int = 1

    def size(self, *axes: str) -> int:
        """Ranks of a group along these axes; without any, of the whole mesh."""
        return math.prod(getattr(self, axis) for axis in axes or AXES)

    def coordinates(self, rank: int) -> Coordinates:
        """Where a rank is.

        Raises:
            ValueError: the mesh has no such rank.
        """
        if not 0 <= rank < self.size():
            raise ValueError(f"rank {rank} is not in {self} (0 to {self.size() - 1})")
        numbers = []
        for axis in reversed(AXES):
            rank, number = divmod(rank, self.size(axis))
            numbers.append(number)
        return Coordinates(*reversed(numbers))

    def rank_at(self, at: Coordinates) -> int:
        """The rank with these coordinates."""
        return self._number(at, AXES)

    def index(self, rank: int, *axes: str) -> int:
        """The rank's number within its group along these axes."""
        return self._number(self.coordinates(rank), axes)

    def groups(self, *axes: str) -> list[list[int]]:
        """All groups of ranks that differ along these axes only, each in the order of `index`."""
        others = [axis for axis in AXES if axis not in axes]
        result: list[list[int]] = [[] for _ in range(self.size() // self.size(*axes))]
        for rank in range(self.size()):
            result[self._number(self.coordinates(rank), others)].append(rank)
        return result

    def _number(self, at: Coordinates, axes: "tuple[str, ...] | list[str]") -> int:
        number = 0
        for axis in AXES:
            if axis in axes:
                number = number * self.size(axis) + getattr(at, axis)
        return number


def fit_mesh(processes: int, p: ParallelConfig) -> Mesh:
    """The mesh of a configuration: what tensor and pipeline leave of the processes is for data.

    Raises:
        UserError: there are no processes, or tensor * context * pipeline does not divide their number.
    """
    if processes < 1:
        raise UserError(f"{processes} processes cannot train; give at least 1")
    together = p.tensor * p.context * p.pipeline
    if processes % together:
        raise UserError(
            f"{processes} processes cannot hold parallel.tensor={p.tensor} x parallel.context={p.context} x"
            f" parallel.pipeline={p.pipeline} = {together} (remainder {processes % together}); start a multiple of"
            f" {together} processes or change the layout"
        )
    return Mesh(pipeline=p.pipeline, data=processes // together, context=p.context, tensor=p.tensor)
