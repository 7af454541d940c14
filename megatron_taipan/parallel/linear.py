"""The products on a block's two edges together with what tensor ranks send each other there.

Where the tokens are sharded and the group has an `overlapped_comm` (overlapped_comm.py), the products are computed
chunk by chunk while the tokens are under way; otherwise the weights' gradients are computed during the backward
collective. A shard is saved for the backward pass as it is, and gathered again there. Selective recomputation caches
the result of a product together with its communication.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_taipan.parallel.collectives import all_gather, reduce_scatter
from megatron_taipan.parallel.overlapped_comm import Fetch

if TYPE_CHECKING:
    from megatron_taipan.parallel.tensor import TensorParallel


class ColumnParallelLinear(torch.autograd.Function):
    """(tp, x, *weights) -> the products of `OneRank.column_parallel_linear`.

    The input's gradient is on its way to the other ranks while the weights' gradients are computed.
    """

    @staticmethod
    def forward(ctx, tp, x, *weights):
        ctx.tp = tp
        ctx.save_for_backward(x, *weights)
        return tp.recompute_cache(partial(_products, tp, x, weights))

    @staticmethod
    def backward(ctx, *grads):
        x, *weights = ctx.saved_tensors
        rows = [grad.reshape(-1, grad.shape[-1]) for grad in grads]  # [n, e]
        needs_x, *needed = ctx.needs_input_grad[1:]
        gradients = _grads_by_collectives if ctx.tp.overlapped_comm is None else _grads_in_chunks
        dx, dweights = gradients(ctx.tp, x, weights, rows, needs_x, needed)
        return None, dx, *dweights


def _products(tp: "TensorParallel", x: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """x [b, l, d], or [n, d] from its shards, times each of the weights."""
    if tp.overlapped_comm is None:
        whole = all_gather(x, tp) if tp.sequence_parallel else x
        return tuple(F.linear(whole, weight) for weight in weights)
    outputs = tuple(x.new_empty(tp.size * len(x), len(weight)) for weight in weights)

    def product(rank: int, chunk: Tensor) -> None:
        for out, weight in zip(outputs, weights, strict=True):
            torch.mm(chunk, weight.t(), out=out.chunk(tp.size)[rank])

    tp.count("all_gather", x, chunks=tp.size)
    tp.overlapped_comm.gather(x, product)
    return outputs


def _grads_by_collectives(tp, x, weights, rows, needs_x, needed):
    """Gradients of x and of the weights where needed, from those of the outputs, rows [n, e] each."""
    whole = all_gather(x, tp) if tp.sequence_parallel and any(needed) else x
    dx = work = None
    if needs_x:
        dx = _sum_over_weights(rows, weights)
        dx, work = _start_sum(dx if tp.sequence_parallel else dx.view(x.shape), tp)
    flat = whole.reshape(-1, whole.shape[-1])
    dweights = [grad.t() @ flat if wanted else None for grad, wanted in zip(rows, needed, strict=True)]
    if work is not None:
        work.wait()
    return dx, dweights


def _grads_in_chunks(tp, x, weights, rows, needs_x, needed):
    """As `_grads_by_collectives`; x [n/tp, d] comes from the other ranks under the products that make its gradient."""
    fetch = None
    if any(needed):
        tp.count("all_gather", x, chunks=tp.size)
        fetch = Fetch(tp.overlapped_comm, x)
    dweights: list[Tensor | None] = [None] * len(weights)

    def of_weights() -> None:
        if fetch is None:
            return
        whole = fetch.whole()
        for i, wanted in enumerate(needed):
            dweights[i] = rows[i].t() @ whole if wanted else None
        fetch.end()

    if needs_x:
        tp.count("reduce_scatter", x, chunks=tp.size)
        chunks = [grad.chunk(tp.size) for grad in rows]

        def part(rank: int, total: Tensor | None = None) -> Tensor:
            return _sum_over_weights([p[rank] for p in chunks], weights, total)

        return tp.overlapped_comm.scatter(part, of_weights, partial(part, tp.rank)), dweights
    of_weights()
    return None, dweights


def _sum_over_weights(rows: list[Tensor], weights: list[Tensor], total: Tensor | None = None) -> Tensor:
    """The sum of rows[i] [n, e] @ weights[i] [e, d], added to `total` where there is one."""
    for grad, weight in zip(rows, weights, strict=True):
        total = grad @ weight if total is None else total.addmm_(grad, weight)
    assert total is not None
    return total


class RowParallelLinear(torch.autograd.Function):
    """x [..., e], weight [d, e] -> the ranks' sum [..., d], with sequence parallelism this rank's shard [n/tp, d]."""

    @staticmethod
    def forward(ctx, tp, x, weight):
        ctx.tp = tp
        ctx.save_for_backward(x, weight)
        (total,) = tp.recompute_cache(partial(_summed_product, tp, x, weight))
        return total

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        tp, grad = ctx.tp, grad.contiguous()
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        flat, rows = dx.view(-1, x.shape[-1]), x.reshape(-1, x.shape[-1])
        if tp.overlapped_comm is None:
            whole = all_gather(grad, tp) if tp.sequence_parallel else grad.view(-1, grad.shape[-1])
            torch.mm(whole, weight, out=flat)
            return None, dx, whole.t() @ rows
        tp.count("all_gather", grad, chunks=tp.size)
        chunks = flat.chunk(tp.size)
        dweight = tp.overlapped_comm.gather(
            grad, lambda rank, chunk: torch.mm(chunk, weight, out=chunks[rank]), lambda whole: whole.t() @ rows
        )
        return None, dx, dweight


def _summed_product(tp: "TensorParallel", x: Tensor, weight: Tensor) -> tuple[Tensor]:
    """The sum over the ranks of x [..., e] @ weight [d, e].t(), or this rank's shard of it."""
    if tp.overlapped_comm is None:
        total, work = _start_sum(F.linear(x, weight), tp)
        work.wait()
        return (total,)
    chunks = x.reshape(-1, x.shape[-1]).chunk(tp.size)
    shard = tp.overlapped_comm.scatter(lambda rank: chunks[rank] @ weight.t())
    tp.count("reduce_scatter", shard, chunks=tp.size)
    return (shard,)


def _start_sum(x: Tensor, tp: "TensorParallel") -> tuple[Tensor, Any]:
    """The ranks' sum of x [..., d], or this rank's shard of it, once the work is done; x may be overwritten."""
    if tp.sequence_parallel:
        return reduce_scatter(x, tp, async_op=True)
    tp.count("all_reduce", x)
    return x, dist.all_reduce(x, group=tp.group, async_op=True)
