"""A rank's place in its tensor-parallel group: all that the network knows of other ranks."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from megatron_taipan.parallel.counter import CommCounter
from megatron_taipan.parallel.exchange import OverlappedComm
from megatron_taipan.parallel.recompute_cache import RecomputeCache


@dataclass(frozen=True)
class TensorParallel:
    """This rank's place in its tensor-parallel group. The default is a group of one."""

    size: int = 1
    rank: int = 0
    group: Any = None
    sequence_parallel: bool = False
    counter: CommCounter = field(default_factory=CommCounter)
    exchange: OverlappedComm | None = None  # of shards, in pieces under the products; None: collectives, or no shards
    recompute_cache: RecomputeCache = field(default_factory=RecomputeCache)

    def count(self, collective: str, tensor: Tensor, pieces: int = 1) -> None:
        """Notes what is sent: a tensor as a whole, or as one of so many pieces of it."""
        self.counter.add(collective, tensor.numel() * tensor.element_size() * pieces)

    def stream_shape(self, batch: int, length: int, d_model: int) -> tuple[int, ...]:
        """Of the residual stream on this rank: [b, l, d], or with sequence parallelism its run of the tokens."""
        if self.sequence_parallel:
            return batch * length // self.size, d_model
        return batch, length, d_model
