"""Collectives of the tensor-parallel group as autograd functions.

A block reads a replicated (or sequence-sharded) stream, works on this rank's slice of the heads, and gives back a
partial sum. `enter_block` and `leave_block` are those two edges; with sequence parallelism they gather and scatter
the sequence instead of all-reducing (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2).

    enter_block    forward: identity   | all-gather          backward: all-reduce | reduce-scatter
    leave_block    forward: all-reduce | reduce-scatter      backward: identity   | all-gather

`enter_linear` is the first of them with the products behind it, whose weights' gradients hide the backward collective.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_taipan.parallel.groups import TensorParallel


def enter_block(x: Tensor, tp: TensorParallel) -> Tensor:
    """The stream [b, l or l/tp, d] as the whole sequence [b, l, d], before products with column-split weights."""
    if tp.size == 1:
        return x
    return _GatherSequence.apply(x, tp) if tp.sequence_parallel else _SumGradient.apply(x, tp)


def enter_linear(x: Tensor, tp: TensorParallel, *weights: Tensor) -> tuple[Tensor, ...]:
    """F.linear(enter_block(x), weight) for each column-split weight [e, d]: the stream to [b, l, e]."""
    if tp.size == 1:
        return tuple(F.linear(x, weight) for weight in weights)
    return _EnterLinear.apply(tp, x, *weights)


def leave_block(x: Tensor, tp: TensorParallel) -> Tensor:
    """Sums the ranks' partial results [b, l, d] into the stream, [b, l, d] or this rank's shard [b, l/tp, d]."""
    if tp.size == 1:
        return x
    return _ScatterSequence.apply(x, tp) if tp.sequence_parallel else _Sum.apply(x, tp)


def sum_gradients(tp: TensorParallel, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors unchanged; their gradients are summed over the ranks, in one all-reduce.

    For replicated parameters of which each rank's heads use a part, or that see a sequence shard only.
    """
    if tp.size == 1:
        return tensors
    return _SumGradients.apply(tp, *tensors)


def stream_parameters(tp: TensorParallel, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Replicated parameters that work on the stream (norms, the gate): under sequence parallelism each rank sees
    its shard of the tokens only, so their gradients are summed."""
    return sum_gradients(tp, *tensors) if tp.sequence_parallel else tensors


def sum_over_ranks(x: Tensor, tp: TensorParallel) -> Tensor:
    """The sum over ranks of a value from which every rank computes on differently: both directions all-reduce."""
    return x if tp.size == 1 else _SumBoth.apply(x, tp)


def sum_over_shards(x: Tensor, tp: TensorParallel) -> Tensor:
    """Sums a statistic over sequence shards; all ranks compute the same from it, so the gradient passes as it is."""
    return _Sum.apply(x, tp) if tp.sequence_parallel else x


def gather_tokens(x: Tensor, tp: TensorParallel) -> Tensor:
    """Joins sequence shards [b, l/tp, ...] to [b, l, ...] without gradient; no-op without sequence parallelism."""
    return _all_gather(x, tp) if tp.sequence_parallel else x


def take_tokens(x: Tensor, tp: TensorParallel) -> Tensor:
    """This rank's shard [b, l/tp, ...] of per-token data [b, l, ...]; no-op without sequence parallelism."""
    return x.chunk(tp.size, 1)[tp.rank] if tp.sequence_parallel else x


def all_reduce_max(x: Tensor, tp: TensorParallel) -> Tensor:
    """Element-wise maximum over the ranks, no gradient."""
    return x if tp.size == 1 else _all_reduce(x, tp, dist.ReduceOp.MAX)


def all_reduce_sum(x: Tensor, tp: TensorParallel) -> Tensor:
    """Element-wise sum over the ranks, no gradient."""
    return x if tp.size == 1 else _all_reduce(x, tp)


def _all_reduce(x: Tensor, tp: TensorParallel, op=dist.ReduceOp.SUM) -> Tensor:
    out = x.contiguous().clone()
    tp.counter.add("all_reduce", out.numel() * out.element_size())
    dist.all_reduce(out, op, group=tp.group)
    return out


def _all_gather(x: Tensor, tp: TensorParallel) -> Tensor:
    """[b, l/tp, ...] -> [b, l, ...]."""
    b, shard, *rest = x.shape
    parts = x.new_empty(tp.size * b, shard, *rest)  # rank by rank
    tp.counter.add("all_gather", x.numel() * x.element_size() * tp.size)
    dist.all_gather_into_tensor(parts, x.contiguous(), group=tp.group)
    return parts.unflatten(0, (tp.size, b)).transpose(0, 1).reshape(b, tp.size * shard, *rest)


def _reduce_scatter(x: Tensor, tp: TensorParallel) -> Tensor:
    """[b, l, ...] -> this rank's [b, l/tp, ...] of the sum."""
    out, _ = _start_reduce_scatter(x, tp, wait=True)
    return out


def _start_reduce_scatter(x: Tensor, tp: TensorParallel, wait: bool = False) -> tuple[Tensor, Any]:
    """The result, once the work beside it has been waited for, and that work."""
    b, l, *rest = x.shape
    parts = x.reshape(b, tp.size, l // tp.size, *rest).transpose(0, 1).reshape(tp.size * b, l // tp.size, *rest)
    out = x.new_empty(b, l // tp.size, *rest)
    tp.counter.add("reduce_scatter", x.numel() * x.element_size())
    return out, dist.reduce_scatter_tensor(out, parts, group=tp.group, async_op=not wait)


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp = tp
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _all_reduce(grad, ctx.tp), None


class _EnterLinear(torch.autograd.Function):
    """The input's gradient is on its way to the other ranks while the weights' gradients are computed."""

    @staticmethod
    def forward(ctx, tp, x, *weights):
        ctx.tp = tp
        whole = _all_gather(x, tp) if tp.sequence_parallel else x
        ctx.save_for_backward(whole, *weights)
        return tuple(F.linear(whole, weight) for weight in weights)

    @staticmethod
    def backward(ctx, *grads):
        whole, *weights = ctx.saved_tensors
        rows = [grad.reshape(-1, grad.shape[-1]) for grad in grads]  # [b * l, e]
        dx, work = None, None
        if ctx.needs_input_grad[1]:
            dx = rows[0] @ weights[0]
            for grad, weight in zip(rows[1:], weights[1:], strict=True):
                dx.addmm_(grad, weight)
            dx, work = _start_sum(dx.view(whole.shape), ctx.tp)
        flat = whole.reshape(-1, whole.shape[-1])
        needed = ctx.needs_input_grad[2:]
        dweights = [grad.t() @ flat if wanted else None for grad, wanted in zip(rows, needed, strict=True)]
        if work is not None:
            work.wait()
        return None, dx, *dweights


def _start_sum(x: Tensor, tp: TensorParallel) -> tuple[Tensor, Any]:
    """The ranks' sum of x [b, l, d], or this rank's shard of it, once the work is done; x may be overwritten."""
    if tp.sequence_parallel:
        return _start_reduce_scatter(x, tp)
    tp.counter.add("all_reduce", x.numel() * x.element_size())
    return x, dist.all_reduce(x, group=tp.group, async_op=True)


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
        return _all_reduce(x, tp)

    @staticmethod
    def backward(ctx, grad):
        return _all_reduce(grad, ctx.tp), None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp = tp
        return _all_gather(x, tp)

    @staticmethod
    def backward(ctx, grad):
        return _reduce_scatter(grad, ctx.tp), None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp = tp
        return _reduce_scatter(x, tp)

    @staticmethod
    def backward(ctx, grad):
        return _all_gather(grad, ctx.tp), None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tp, *tensors):
        ctx.tp = tp
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *grads):
        wide = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
        flat = _all_reduce(torch.cat([g.reshape(-1).to(wide) for g in grads]), ctx.tp)
        parts = flat.split([g.numel() for g in grads])
        return None, *(part.view_as(g).to(g.dtype) for part, g in zip(parts, grads, strict=True))
