"""This rank's place in its tensor-parallel group, and what the layers ask of the group: the real `OneRank`.

Collectives are in collectives.py, products together with their communication in linear.py, parameters that all ranks
hold in replicated.py.
"""

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_taipan.ops.product import Weight
from megatron_taipan.parallel.collectives import (
    GatherShards,
    Sum,
    SumBoth,
    SumGradient,
    SumIntoShards,
    all_gather,
    all_reduce,
)
from megatron_taipan.parallel.counter import CommCounter
from megatron_taipan.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_taipan.parallel.one_rank import OneRank
from megatron_taipan.parallel.overlapped_comm import OverlappedComm
from megatron_taipan.parallel.recompute_cache import RecomputeCache
from megatron_taipan.parallel.replicated import sum_gradients


@dataclass(frozen=True)
class TensorParallel(OneRank):
    """A tensor-parallel group as one of its ranks sees it. The default is a group of one.

    Methods are documented where they are first written, in `OneRank`.
    """

    size: int = 1
    rank: int = 0
    group: Any = None
    sequence_parallel: bool = False
    counter: CommCounter = field(default_factory=CommCounter)
    overlapped_comm: OverlappedComm | None = None  # of shards, beside the products; None: collectives, or no shards
    recompute_cache: RecomputeCache = field(default_factory=RecomputeCache)

    def count(self, collective: str, tensor: Tensor, chunks: int = 1) -> None:
        """Notes what is sent: a tensor as a whole, or as one of so many chunks."""
        self.counter.add(collective, tensor.numel() * tensor.element_size() * chunks)

    def stream_shape(self, batch: int, length: int, d_model: int) -> tuple[int, ...]:
        """Of the residual stream on this rank: [b, l, d], or with sequence parallelism its shard of the tokens."""
        if self.sequence_parallel:
            return batch * length // self.size, d_model
        return batch, length, d_model

    def column_parallel_linear(self, x: Tensor, *weights: Weight) -> tuple[Tensor, ...]:
        if self.size == 1:
            return super().column_parallel_linear(x, *weights)
        return ColumnParallelLinear.apply(self, x, *weights)

    def row_parallel_linear(self, x: Tensor, weight: Weight) -> Tensor:
        if self.size == 1:
            return super().row_parallel_linear(x, weight)
        return RowParallelLinear.apply(self, x, weight)

    def copy_to_tensor_parallel(self, x: Tensor) -> Tensor:
        if self.size == 1:
            return x
        return GatherShards.apply(x, self) if self.sequence_parallel else SumGradient.apply(x, self)

    def reduce_from_tensor_parallel(self, x: Tensor) -> Tensor:
        if self.size == 1:
            return x
        return SumIntoShards.apply(x, self) if self.sequence_parallel else Sum.apply(x, self)

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        return x if self.size == 1 else SumBoth.apply(x, self)

    def sum_over_shards(self, x: Tensor) -> Tensor:
        return Sum.apply(x, self) if self.sequence_parallel else x

    def gather_sequence(self, x: Tensor) -> Tensor:
        return all_gather(x, self) if self.sequence_parallel else x

    def shard_sequence(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).chunk(self.size)[self.rank] if self.sequence_parallel else x

    def embed_shard(self, x: Tensor) -> Tensor:
        if not self.sequence_parallel:
            return x
        return F.pad(x, (self.rank * len(x), (self.size - 1 - self.rank) * len(x)))

    def all_reduce_max(self, x: Tensor) -> Tensor:
        return x if self.size == 1 else all_reduce(x, self, dist.ReduceOp.MAX)

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        return x if self.size == 1 else all_reduce(x, self)

    def sum_gradients(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Those from `sum_gradients_ahead` stay as they are."""
        return tensors if self.size == 1 else sum_gradients(self, *tensors)

    def stream_parameters(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.sum_gradients(*tensors) if self.sequence_parallel else tensors
