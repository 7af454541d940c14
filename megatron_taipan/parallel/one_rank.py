"""What the layers ask of their tensor-parallel group, answered for a group of one: nothing is sent.

tensor.py answers for groups of any size; names are Megatron-LM's where it has one. Layers ask the object that they
were built with and import nothing else of this room, so that a network on one process needs this file alone.
"""

from torch import Tensor

from megatron_taipan.ops.product import Weight, product


class OneRank:
    """A tensor-parallel group of one rank, which holds all heads, all columns and all tokens."""

    size: int = 1
    rank: int = 0
    sequence_parallel: bool = False  # whether each rank works on its shard of the tokens between the blocks

    def column_parallel_linear(self, x: Tensor, *weights: Weight) -> tuple[Tensor, ...]:
        """F.linear(copy_to_tensor_parallel(x), weight) for each column-split weight [e, d].

        Returns:
            [b, l, e], or [n, e] from a shard.
        """
        return tuple(product(x, weight) for weight in weights)

    def row_parallel_linear(self, x: Tensor, weight: Weight) -> Tensor:
        """reduce_from_tensor_parallel(F.linear(x, weight)) for a row-split weight [d, e] and x [b, l, e] or [n, e]."""
        return product(x, weight)

    def copy_to_tensor_parallel(self, x: Tensor) -> Tensor:
        """The stream before products with column-split weights: [b, l, d] as it is, a shard [n/tp, d] as [n, d]."""
        return x

    def reduce_from_tensor_parallel(self, x: Tensor) -> Tensor:
        """Sums the ranks' partial results [b, l, d] or [n, d] into the stream, of that shape or a shard [n/tp, d]."""
        return x

    def sum_over_ranks(self, x: Tensor) -> Tensor:
        """The sum over ranks of a value from which every rank computes on differently: the gradients are summed too."""
        return x

    def sum_over_shards(self, x: Tensor) -> Tensor:
        """Sums a statistic over the shards; all ranks compute the same from it, so the gradient passes as it is."""
        return x

    def gather_sequence(self, x: Tensor) -> Tensor:
        """Joins shards [n/tp, ...] to [n, ...], without gradient; x itself without sequence parallelism."""
        return x

    def shard_sequence(self, x: Tensor) -> Tensor:
        """This rank's shard [n/tp, ...] of per-token data [b, l, ...]; x itself without sequence parallelism."""
        return x

    def embed_shard(self, x: Tensor) -> Tensor:
        """A shard [n/tp] at its place in zeros [n]; x itself without sequence parallelism."""
        return x

    def all_reduce_max(self, x: Tensor) -> Tensor:
        """Element-wise maximum over the ranks, no gradient."""
        return x

    def all_reduce_sum(self, x: Tensor) -> Tensor:
        """Element-wise sum over the ranks, no gradient."""
        return x

    def sum_gradients(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors unchanged; their gradients are summed over the ranks, in one all-reduce.

        For replicated parameters of which each rank's heads use a part, or that see a shard of the tokens only.
        """
        return tensors

    def stream_parameters(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Replicated parameters that work on the stream (norms, the gate): under sequence parallelism each rank sees
        its shard of the tokens only, so their gradients are summed."""
        return tensors
