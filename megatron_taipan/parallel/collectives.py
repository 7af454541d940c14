"""Collectives of the tensor-parallel group as autograd functions.

A block reads a replicated (or sharded) stream, works on this rank's slice of the heads, and gives back a partial sum.
`copy_to_tensor_parallel` and `reduce_from_tensor_parallel` are those two edges (Megatron-LM's names); with sequence
parallelism they gather and scatter the tokens instead of all-reducing (Korthikanti et al. 2022, arXiv 2205.05198,
section 4.2.2).

    copy_to_tensor_parallel      forward: identity   | all-gather        backward: all-reduce | reduce-scatter
    reduce_from_tensor_parallel  forward: all-reduce | reduce-scatter    backward: identity   | all-gather

The shards are runs of the tokens of all b rows, one row behind the other: rank r holds tokens r n / tp to
(r + 1) n / tp - 1 of n = b l. So what the collectives give and take lies in order in memory, whatever b is; shards of
each row would have to be copied into place on every edge. What works on single tokens does not care; who needs rows
knows their number and length.

The edges with the products beside them are in linear.py, parameters that all ranks hold in replicated.py.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_taipan.parallel.tensor import TensorParallel


def copy_to_tensor_parallel(x: Tensor, tp: TensorParallel) -> Tensor:
    """The stream before products with column-split weights: [b, l, d] as it is, a shard [n/tp, d] as [n, d]."""
    if tp.size == 1:
        return x
    return _GatherShards.apply(x, tp) if tp.sequence_parallel else _SumGradient.apply(x, tp)


def reduce_from_tensor_parallel(x: Tensor, tp: TensorParallel) -> Tensor:
    """Sums the ranks' partial results [b, l, d] or [n, d] into the stream, of that shape or a shard [n/tp, d]."""
    if tp.size == 1:
        return x
    return _SumIntoShards.apply(x, tp) if tp.sequence_parallel else _Sum.apply(x, tp)


def sum_over_ranks(x: Tensor, tp: TensorParallel) -> Tensor:
    """The sum over ranks of a value from which every rank computes on differently: both directions all-reduce."""
    return x if tp.size == 1 else _SumBoth.apply(x, tp)


def sum_over_shards(x: Tensor, tp: TensorParallel) -> Tensor:
    """Sums a statistic over the shards; all ranks compute the same from it, so the gradient passes as it is."""
    return _Sum.apply(x, tp) if tp.sequence_parallel else x


def gather_sequence(x: Tensor, tp: TensorParallel) -> Tensor:
    """Joins shards [n/tp, ...] to [n, ...] by a collective, without gradient; no-op without sequence parallelism."""
    return all_gather(x, tp) if tp.sequence_parallel else x


def shard_sequence(x: Tensor, tp: TensorParallel) -> Tensor:
    """This rank's shard [n/tp, ...] of per-token data [b, l, ...]; no-op without sequence parallelism."""
    return x.flatten(0, 1).chunk(tp.size)[tp.rank] if tp.sequence_parallel else x


def embed_shard(x: Tensor, tp: TensorParallel) -> Tensor:
    """A shard [n/tp] at its place in zeros [n]; no-op without sequence parallelism."""
    if not tp.sequence_parallel:
        return x
    return F.pad(x, (tp.rank * len(x), (tp.size - 1 - tp.rank) * len(x)))


def all_reduce_max(x: Tensor, tp: TensorParallel) -> Tensor:
    """Element-wise maximum over the ranks, no gradient."""
    return x if tp.size == 1 else _all_reduce(x, tp, dist.ReduceOp.MAX)


def all_reduce_sum(x: Tensor, tp: TensorParallel) -> Tensor:
    """Element-wise sum over the ranks, no gradient."""
    return x if tp.size == 1 else _all_reduce(x, tp)


def _all_reduce(x: Tensor, tp: TensorParallel, op=dist.ReduceOp.SUM) -> Tensor:
    out = x.contiguous().clone()
    tp.count("all_reduce", out)
    dist.all_reduce(out, op, group=tp.group)
    return out


def all_gather(x: Tensor, tp: TensorParallel) -> Tensor:
    """[n/tp, ...] -> [n, ...]."""
    whole = x.new_empty(tp.size * len(x), *x.shape[1:])
    tp.count("all_gather", whole)
    dist.all_gather_into_tensor(whole, x.contiguous(), group=tp.group)
    return whole


def reduce_scatter(x: Tensor, tp: TensorParallel, *, async_op: bool = False) -> tuple[Tensor, Any]:
    """[..., d] -> this rank's [n/tp, d] of the sum; with async_op once the work beside it has been waited for."""
    whole = x.reshape(-1, x.shape[-1]).contiguous()
    out = x.new_empty(len(whole) // tp.size, x.shape[-1])
    tp.count("reduce_scatter", x)
    return out, dist.reduce_scatter_tensor(out, whole, group=tp.group, async_op=async_op)


def gather_shards(x: Tensor, tp: TensorParallel) -> Tensor:
    """[n/tp, ...] -> [n, ...], through the exchange where there is one."""
    if tp.exchange is None:
        return all_gather(x, tp)
    x = x.contiguous()
    whole = x.new_empty(tp.size * len(x), *x.shape[1:])
    tp.count("all_gather", whole)
    tp.exchange.gather(x, lambda rank, piece: whole.chunk(tp.size)[rank].copy_(piece))
    return whole


def scatter_sum(x: Tensor, tp: TensorParallel) -> Tensor:
    """[..., d] -> this rank's [n/tp, d] of the sum, through the exchange where there is one."""
    if tp.exchange is None:
        return reduce_scatter(x, tp)[0]
    tp.count("reduce_scatter", x)
    pieces = x.reshape(-1, x.shape[-1]).contiguous().chunk(tp.size)
    return tp.exchange.scatter(lambda rank: pieces[rank])


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _all_reduce(grad, ctx.tp), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        return _all_reduce(x, tp)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _SumBoth(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp = tp
        return _sum_quickly(x, tp)

    @staticmethod
    def backward(ctx, grad):
        return _sum_quickly(grad, ctx.tp), None


def _sum_quickly(x: Tensor, tp: TensorParallel) -> Tensor:
    total = tp.exchange.sum(x) if tp.exchange is not None else None
    if total is None:
        return _all_reduce(x, tp)
    tp.count("all_reduce", x)
    return total


class _GatherShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp = tp
        return gather_shards(x, tp)

    @staticmethod
    def backward(ctx, grad):
        return scatter_sum(grad, ctx.tp), None


class _SumIntoShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp, ctx.shape = tp, x.shape
        return scatter_sum(x, tp)

    @staticmethod
    def backward(ctx, grad):
        return gather_shards(grad, ctx.tp).view(ctx.shape), None
