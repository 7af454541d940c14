"""Parameters that every tensor rank holds, each with a part of their gradient: the parts are summed over the ranks."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taipan.ops.copies import copy_all
from megatron_taipan.parallel.tensor import TensorParallel
from megatron_taipan.param_spec import ParamSpec

AHEAD = "summed_ahead"  # attribute of tensors whose gradients are summed over the ranks elsewhere


def sum_gradients(tp: TensorParallel, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors unchanged; their gradients are summed over the ranks, in one all-reduce.

    For replicated parameters of which each rank's heads use a part, or that see a shard of the tokens only. Those from
    `sum_gradients_ahead` stay as they are.
    """
    ahead = [hasattr(t, AHEAD) for t in tensors]
    if tp.size == 1 or all(ahead):
        return tensors
    assert not any(ahead), "the table (parameters.py) says of some of these parameters only that they are summed"
    return _SumGradients.apply(tp, *tensors)


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
        copy_all(parts, grads)
        ctx.tp.count("all_reduce", flat)
        dist.all_reduce(flat, group=ctx.tp.group)
        sums = [torch.empty_like(g) for g in grads]
        copy_all(sums, parts)
        return None, *sums
