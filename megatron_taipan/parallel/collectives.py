"""Collectives of the tensor-parallel group as autograd functions.

A block reads a replicated (or sharded) stream, works on this rank's slice of the heads, and returns a partial sum.
`copy_to_tensor_parallel` and `reduce_from_tensor_parallel` are those two edges (Megatron-LM's names); with sequence
parallelism they gather and scatter the tokens instead of all-reducing (Korthikanti et al. 2022, arXiv 2205.05198,
section 4.2.2).

    copy_to_tensor_parallel      forward: identity   | all-gather        backward: all-reduce | reduce-scatter
    reduce_from_tensor_parallel  forward: all-reduce | reduce-scatter    backward: identity   | all-gather

The shards are runs of the tokens of all b rows, one row after the other: rank r holds tokens r n / tp to
(r + 1) n / tp - 1 of n = b l. So what the collectives send and receive is in order in memory, whatever b is; shards of
each row would have to be copied into place on every edge. Code that works on single tokens is not affected; code that
needs rows knows their number and length.

The layers reach them by their group's methods (tensor.py). The edges with the products beside them are in linear.py,
parameters that all ranks hold in replicated.py.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from megatron_taipan.parallel.tensor import TensorParallel


def all_reduce(x: Tensor, tp: "TensorParallel", op=dist.ReduceOp.SUM) -> Tensor:
    """The ranks' sum, or what else `op` makes of their tensors; a new tensor, no gradient."""
    out = x.contiguous().clone()
    tp.count("all_reduce", out)
    dist.all_reduce(out, op, group=tp.group)
    return out


def all_gather(x: Tensor, tp: "TensorParallel") -> Tensor:
    """[n/tp, ...] -> [n, ...]."""
    whole = x.new_empty(tp.size * len(x), *x.shape[1:])
    tp.count("all_gather", whole)
    dist.all_gather_into_tensor(whole, x.contiguous(), group=tp.group)
    return whole


def reduce_scatter(x: Tensor, tp: "TensorParallel", *, async_op: bool = False) -> tuple[Tensor, Any]:
    """[..., d] -> this rank's [n/tp, d] of the sum; with async_op once the work beside it has been waited for."""
    whole = x.reshape(-1, x.shape[-1]).contiguous()
    out = x.new_empty(len(whole) // tp.size, x.shape[-1])
    tp.count("reduce_scatter", x)
    return out, dist.reduce_scatter_tensor(out, whole, group=tp.group, async_op=async_op)


def gather_shards(x: Tensor, tp: "TensorParallel") -> Tensor:
    """[n/tp, ...] -> [n, ...], through the overlapped communication where there is one."""
    if tp.overlapped_comm is None:
        return all_gather(x, tp)
    x = x.contiguous()
    whole = x.new_empty(tp.size * len(x), *x.shape[1:])
    tp.count("all_gather", whole)
    tp.overlapped_comm.gather(x, lambda rank, chunk: whole.chunk(tp.size)[rank].copy_(chunk))
    return whole


def scatter_sum(x: Tensor, tp: "TensorParallel") -> Tensor:
    """[..., d] -> this rank's [n/tp, d] of the sum, through the overlapped communication where there is one."""
    if tp.overlapped_comm is None:
        return reduce_scatter(x, tp)[0]
    tp.count("reduce_scatter", x)
    chunks = x.reshape(-1, x.shape[-1]).contiguous().chunk(tp.size)
    return tp.overlapped_comm.scatter(lambda rank: chunks[rank])


class SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return all_reduce(grad, ctx.tp), None


class Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        return all_reduce(x, tp)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class SumBoth(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp = tp
        return _sum_quickly(x, tp)

    @staticmethod
    def backward(ctx, grad):
        return _sum_quickly(grad, ctx.tp), None


def _sum_quickly(x: Tensor, tp: "TensorParallel") -> Tensor:
    total = tp.overlapped_comm.sum(x) if tp.overlapped_comm is not None else None
    if total is None:
        return all_reduce(x, tp)
    tp.count("all_reduce", x)
    return total


class GatherShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp = tp
        return gather_shards(x, tp)

    @staticmethod
    def backward(ctx, grad):
        return scatter_sum(grad, ctx.tp), None


class SumIntoShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp, ctx.shape = tp, x.shape
        return scatter_sum(x, tp)

    @staticmethod
    def backward(ctx, grad):
        return gather_shards(grad, ctx.tp).view(ctx.shape), None
