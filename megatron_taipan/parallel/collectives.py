"""Collectives of the tensor-parallel group as autograd functions.

A block reads a replicated (or sharded) stream, works on this rank's slice of the heads, and gives back a partial sum.
`enter_block` and `leave_block` are those two edges; with sequence parallelism they gather and scatter the tokens
instead of all-reducing (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2).

    enter_block    forward: identity   | all-gather          backward: all-reduce | reduce-scatter
    leave_block    forward: all-reduce | reduce-scatter      backward: identity   | all-gather

The shards are runs of the tokens of all b rows, one row behind the other: rank r holds tokens r n / tp to
(r + 1) n / tp - 1 of n = b l. So what the collectives give and take lies in order in memory, whatever b is; shards of
each row would have to be copied into place on every edge. What works on single tokens does not care; who needs rows
knows their number and length.

`enter_linear` and `leave_linear` are the edges with the products beside them. Where the tokens are sharded and the
group has an exchange (exchange.py), the products go piece by piece and hide the way of the tokens; else the weights'
gradients hide the backward collective. A shard is kept for the backward pass as it is, and gathered once more there.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_taipan.parallel.exchange import Fetch
from megatron_taipan.parallel.groups import TensorParallel
from megatron_taipan.parallel.layout import ParamSpec


def enter_block(x: Tensor, tp: TensorParallel) -> Tensor:
    """The stream before products with column-split weights: [b, l, d] as it is, a shard [n/tp, d] as [n, d]."""
    if tp.size == 1:
        return x
    return _GatherTokens.apply(x, tp) if tp.sequence_parallel else _SumGradient.apply(x, tp)


def enter_linear(x: Tensor, tp: TensorParallel, *weights: Tensor) -> tuple[Tensor, ...]:
    """F.linear(enter_block(x), weight) for each column-split weight [e, d]: [b, l, e], or [n, e] from a shard."""
    if tp.size == 1:
        return tuple(F.linear(x, weight) for weight in weights)
    return _EnterLinear.apply(tp, x, *weights)


def leave_linear(x: Tensor, weight: Tensor, tp: TensorParallel) -> Tensor:
    """leave_block(F.linear(x, weight)) for a row-split weight [d, e] and x [b, l, e] or [n, e]."""
    if tp.size == 1 or not tp.sequence_parallel:
        return leave_block(F.linear(x, weight), tp)
    return _LeaveLinear.apply(tp, x, weight)


def leave_block(x: Tensor, tp: TensorParallel) -> Tensor:
    """Sums the ranks' partial results [b, l, d] or [n, d] into the stream, of that shape or a shard [n/tp, d]."""
    if tp.size == 1:
        return x
    return _ScatterTokens.apply(x, tp) if tp.sequence_parallel else _Sum.apply(x, tp)


def sum_gradients(tp: TensorParallel, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors unchanged; their gradients are summed over the ranks, in one all-reduce.

    For replicated parameters of which each rank's heads use a part, or that see a shard of the tokens only. Those from
    `sum_gradients_ahead` stay as they are.
    """
    ahead = [hasattr(t, AHEAD) for t in tensors]
    if tp.size == 1 or all(ahead):
        return tensors
    assert not any(ahead), "the table (parallel/layout.py) says of some of these parameters only that they are summed"
    return _SumGradients.apply(tp, *tensors)


AHEAD = "summed_ahead"  # attribute of tensors whose gradients are summed over the ranks elsewhere


def sum_gradients_ahead(tp: TensorParallel, specs: Sequence[ParamSpec], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Parameters for many layers, their gradients summed in one all-reduce where each layer would make its own.

    Args:
        specs: what the table says of each.
    """
    result = list(tensors)
    which = [i for i, spec in enumerate(specs) if spec.summed or (spec.on_stream and tp.sequence_parallel)]
    if tp.size > 1 and which:
        for i, t in zip(which, _SumGradients.apply(tp, *(tensors[i] for i in which)), strict=True):
            setattr(t, AHEAD, True)
            result[i] = t
    return result


def stream_parameters(tp: TensorParallel, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Replicated parameters that work on the stream (norms, the gate): under sequence parallelism each rank sees
    its shard of the tokens only, so their gradients are summed."""
    return sum_gradients(tp, *tensors) if tp.sequence_parallel else tensors


def sum_over_ranks(x: Tensor, tp: TensorParallel) -> Tensor:
    """The sum over ranks of a value from which every rank computes on differently: both directions all-reduce."""
    return x if tp.size == 1 else _SumBoth.apply(x, tp)


def sum_over_shards(x: Tensor, tp: TensorParallel) -> Tensor:
    """Sums a statistic over the shards; all ranks compute the same from it, so the gradient passes as it is."""
    return _Sum.apply(x, tp) if tp.sequence_parallel else x


def gather_tokens(x: Tensor, tp: TensorParallel) -> Tensor:
    """Joins shards [n/tp, ...] to [n, ...] without gradient; no-op without sequence parallelism."""
    return _all_gather(x, tp) if tp.sequence_parallel else x


def take_tokens(x: Tensor, tp: TensorParallel) -> Tensor:
    """This rank's shard [n/tp, ...] of per-token data [b, l, ...]; no-op without sequence parallelism."""
    return x.flatten(0, 1).chunk(tp.size)[tp.rank] if tp.sequence_parallel else x


def put_tokens(x: Tensor, tp: TensorParallel) -> Tensor:
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


def _all_gather(x: Tensor, tp: TensorParallel) -> Tensor:
    """[n/tp, ...] -> [n, ...]."""
    whole = x.new_empty(tp.size * len(x), *x.shape[1:])
    tp.count("all_gather", whole)
    dist.all_gather_into_tensor(whole, x.contiguous(), group=tp.group)
    return whole


def _reduce_scatter(x: Tensor, tp: TensorParallel, *, async_op: bool = False) -> tuple[Tensor, Any]:
    """[..., d] -> this rank's [n/tp, d] of the sum; with async_op once the work beside it has been waited for."""
    whole = x.reshape(-1, x.shape[-1]).contiguous()
    out = x.new_empty(len(whole) // tp.size, x.shape[-1])
    tp.count("reduce_scatter", x)
    return out, dist.reduce_scatter_tensor(out, whole, group=tp.group, async_op=async_op)


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
        ctx.save_for_backward(x, *weights)
        if not tp.sequence_parallel or tp.exchange is None or tp.exchange.whole_products:
            whole = _gather(x, tp) if tp.sequence_parallel else x
            return tuple(F.linear(whole, weight) for weight in weights)
        outputs = tuple(x.new_empty(tp.size * len(x), len(weight)) for weight in weights)

        def products(rank: int, piece: Tensor) -> None:
            for out, weight in zip(outputs, weights, strict=True):
                torch.mm(piece, weight.t(), out=out.chunk(tp.size)[rank])

        tp.count("all_gather", x, pieces=tp.size)
        tp.exchange.gather(x, products)
        return outputs

    @staticmethod
    def backward(ctx, *grads):
        x, *weights = ctx.saved_tensors
        rows = [grad.reshape(-1, grad.shape[-1]) for grad in grads]  # [n, e]
        needs_x, *needed = ctx.needs_input_grad[1:]
        run = _enter_in_pieces if ctx.tp.sequence_parallel and ctx.tp.exchange is not None else _enter_whole
        dx, dweights = run(ctx.tp, x, weights, rows, needs_x, needed)
        return None, dx, *dweights


def _enter_whole(tp, x, weights, rows, needs_x, needed):
    """Gradients of x and of the weights where needed, from those of the outputs, rows [n, e] each."""
    whole = _all_gather(x, tp) if tp.sequence_parallel and any(needed) else x
    dx = work = None
    if needs_x:
        dx = _product_of_sum(rows, weights)
        dx, work = _start_sum(dx if tp.sequence_parallel else dx.view(x.shape), tp)
    flat = whole.reshape(-1, whole.shape[-1])
    dweights = [grad.t() @ flat if wanted else None for grad, wanted in zip(rows, needed, strict=True)]
    if work is not None:
        work.wait()
    return dx, dweights


def _enter_in_pieces(tp, x, weights, rows, needs_x, needed):
    """As `_enter_whole`; x [n/tp, d] comes from the other ranks under the products that make its gradient."""
    fetch = whole = None
    if any(needed):
        tp.count("all_gather", x, pieces=tp.size)
        fetch, whole = Fetch(tp.exchange, x), x.new_empty(tp.size * len(x), x.shape[1])
    dweights: list[Tensor | None] = [None] * len(weights)

    def part(rank: int) -> Tensor:
        if fetch is not None and rank == tp.rank:
            fetch.join(whole)
        return _product_of_sum([grad.chunk(tp.size)[rank] for grad in rows], weights)

    def of_weights() -> None:
        if fetch is None:
            return
        fetch.end()
        for i, wanted in enumerate(needed):
            dweights[i] = rows[i].t() @ whole if wanted else None

    if needs_x:
        tp.count("reduce_scatter", x, pieces=tp.size)
        return tp.exchange.scatter(part, of_weights), dweights
    if fetch is not None:
        fetch.join(whole)
    of_weights()
    return None, dweights


def _product_of_sum(rows: list[Tensor], weights: list[Tensor]) -> Tensor:
    """The sum of rows[i] [n, e] @ weights[i] [e, d]."""
    total = rows[0] @ weights[0]
    for grad, weight in zip(rows[1:], weights[1:], strict=True):
        total.addmm_(grad, weight)
    return total


class _LeaveLinear(torch.autograd.Function):
    """With sequence parallelism: x [..., e], weight [d, e] -> this rank's shard [n/tp, d] of the ranks' sum."""

    @staticmethod
    def forward(ctx, tp, x, weight):
        ctx.tp = tp
        ctx.save_for_backward(x, weight)
        if tp.exchange is None or tp.exchange.whole_products:
            return _scatter(F.linear(x, weight), tp)
        pieces = x.reshape(-1, x.shape[-1]).chunk(tp.size)
        mine = tp.exchange.scatter(lambda rank: pieces[rank] @ weight.t())
        tp.count("reduce_scatter", mine, pieces=tp.size)
        return mine

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        tp, grad = ctx.tp, grad.contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        flat = dx.view(-1, x.shape[-1])
        if tp.exchange is None:
            whole = _all_gather(grad, tp)
            torch.mm(whole, weight, out=flat)
        else:
            whole = grad.new_empty(tp.size * len(grad), grad.shape[1])
            tp.count("all_gather", grad, pieces=tp.size)
            tp.exchange.gather(grad, lambda r, piece: torch.mm(piece, weight, out=flat.chunk(tp.size)[r]), whole)
        return None, dx, whole.t() @ x.reshape(-1, x.shape[-1])


def _gather(x: Tensor, tp: TensorParallel) -> Tensor:
    """[n/tp, ...] -> [n, ...], through the exchange where there is one."""
    if tp.exchange is None:
        return _all_gather(x, tp)
    x = x.contiguous()
    whole = x.new_empty(tp.size * len(x), *x.shape[1:])
    tp.count("all_gather", whole)
    tp.exchange.gather(x, lambda rank, piece: None, whole)
    return whole


def _scatter(x: Tensor, tp: TensorParallel) -> Tensor:
    """[..., d] -> this rank's [n/tp, d] of the sum, through the exchange where there is one."""
    if tp.exchange is None:
        return _reduce_scatter(x, tp)[0]
    tp.count("reduce_scatter", x)
    pieces = x.reshape(-1, x.shape[-1]).contiguous().chunk(tp.size)
    return tp.exchange.scatter(lambda rank: pieces[rank])


def _start_sum(x: Tensor, tp: TensorParallel) -> tuple[Tensor, Any]:
    """The ranks' sum of x [..., d], or this rank's shard of it, once the work is done; x may be overwritten."""
    if tp.sequence_parallel:
        return _reduce_scatter(x, tp, async_op=True)
    tp.count("all_reduce", x)
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


class _GatherTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp = tp
        return _gather(x, tp)

    @staticmethod
    def backward(ctx, grad):
        return _scatter(grad, ctx.tp), None


class _ScatterTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tp):
        ctx.tp, ctx.shape = tp, x.shape
        return _scatter(x, tp)

    @staticmethod
    def backward(ctx, grad):
        return _gather(grad, ctx.tp).view(ctx.shape), None


class _SumGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tp, *tensors):
        ctx.tp = tp
        # no view_as: selective recomputation counts views, and makes these where the forward pass had them made ahead
        return tuple(t.detach() for t in tensors)

    @staticmethod
    def backward(ctx, *grads):
        wide = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
        flat = grads[0].new_empty(sum(g.numel() for g in grads), dtype=wide)
        parts = [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads, strict=True)]
        _copy_all(parts, grads)
        ctx.tp.count("all_reduce", flat)
        dist.all_reduce(flat, group=ctx.tp.group)
        sums = [torch.empty_like(g) for g in grads]
        _copy_all(sums, parts)
        return None, *sums


def _copy_all(to: list[Tensor], tensors: Sequence[Tensor]) -> None:
    """to[i] = tensors[i]; a launch for many, as long as each list has one type."""
    by_types: dict[tuple[torch.dtype, torch.dtype], list[int]] = {}
    for i, (a, b) in enumerate(zip(to, tensors, strict=True)):
        by_types.setdefault((a.dtype, b.dtype), []).append(i)
    for which in by_types.values():
        torch._foreach_copy_([to[i] for i in which], [tensors[i] for i in which])
