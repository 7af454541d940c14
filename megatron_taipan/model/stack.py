"""From embedded tokens to the loss: the steps that every path through the network shares.

The trainer's whole model (taipan.py), its pipeline stages (engine/pipeline.py) and transformers' classes (hf/) differ
in which process holds which layer and in their inputs and outputs. What is computed between is here, once.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_taipan.model.context import Context
from megatron_taipan.model.stream import Measured, Stream
from megatron_taipan.ops.numerics import at_least_float32


class Recompute(NamedTuple):
    """Activation checkpointing: how to store less for the backward pass, and for how many layers at once."""

    run: Callable[..., Any]  # (function, *arguments) -> function(*arguments)
    every: int = 1  # layers of a segment


def recompute_all(run: Callable[..., Any], *args: Any) -> Any:
    """run(*args), storing the arguments only. The gate's noise is a hash and comes out the same the second time."""
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


def residual_stream(embedded: Tensor, *, fp32: bool) -> Tensor:
    """The stream as it enters the first layer: embedded tokens [b, l, d], in float32 with config.residual_fp32."""
    return at_least_float32(embedded) if fp32 else embedded


def run_layers(
    layers: nn.ModuleList,
    h: Tensor,
    ctx: Context,
    recompute: Recompute | None = None,
    into: Tensor | None = None,
) -> tuple[Tensor, list[Measured]]:
    """The residual stream [b, l, d] through the layers, and what they measured.

    Args:
        recompute: activation checkpointing, while gradients are needed; None: everything is kept.
        into: memory for the result; not used with recompute.
    """
    if recompute is None or not torch.is_grad_enabled() or ctx.cache is not None:
        return run_segment(layers, h, ctx, 0, len(layers), into)
    found = []
    for first in range(0, len(layers), recompute.every):
        last = min(first + recompute.every, len(layers))
        h, measured = recompute.run(run_segment, layers, h, ctx, first, last)
        found += measured
    return h, found


def run_segment(
    layers: nn.ModuleList, h: Tensor, ctx: Context, first: int, last: int, into: Tensor | None = None
) -> tuple[Tensor, list[Measured]]:
    """Layers first to last - 1, which run together: additions to h are pending between them, not after the last."""
    stream, found = Stream(h), []
    for index in range(first, last):
        state = ctx.cache.layers[index] if ctx.cache is not None else None
        layer: Any = layers[index]
        stream, measured = layer(stream, ctx, state)
        if measured is not None or not ctx.single:
            Measured.check(measured, f"layers.{layer.layer}", layer.kind.metrics)
        if measured is not None:
            found.append(measured)
    return stream.total(into), found


def total_budget(found: Sequence[Measured], device: torch.device) -> Tensor:
    """The budget losses of all gates added up on a device, 0-dim; 0 where there are none."""
    losses = [measured.budget_loss.to(device) for measured in found if measured.budget_loss is not None]
    return sum(losses, torch.zeros((), device=device))


def training_loss(ce: Any, budget: Any, budget_lambda: Any, share: Any = None) -> Any:
    """What training minimises, of 0-dim tensors or numbers: ce + budget_lambda * budget.

    Args:
        share: of the budget that counts here, where this is one part of a batch; None: all.
    """
    penalty = budget_lambda * budget
    return ce + (penalty if share is None else penalty * share)
