"""Activation checkpointing: what is kept for the backward pass, and what is computed again."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from megatron_taipan.model.context import Context
from megatron_taipan.model.gate import Selection
from megatron_taipan.model.stream import Stream
from megatron_taipan.parallel.groups import TensorParallel

# Matrix products with weights: dear to recompute, and their outputs are what a block cannot do without.
KEPT_OPERATORS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def recomputed(run: Callable[..., Any], mode: str, tp: TensorParallel, *args: Any) -> Any:
    """run(*args), storing less for the backward pass.

    Args:
        mode: "full" stores the arguments only; "selective" also the outputs of matrix products with weights, together
            with what travels for them between tensor ranks, so that norms, convolution, scan and attention are
            computed again. Both re-enter nothing (use_reentrant=False); the gate's noise is a hash and comes out the
            same.
        tp: this rank's place; holds what is kept of products that are joined with what travels.
    """
    if mode == "full":
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
    contexts = partial(create_selective_checkpoint_contexts, list(KEPT_OPERATORS))
    run = tp.kept.checkpointed(run)
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)


def run_layers(
    layers: nn.ModuleList, h: Tensor, ctx: Context, mode: str, every: int, tp: TensorParallel
) -> tuple[Tensor, list[Selection]]:
    """The residual stream [b, l, d] through the layers, and what their gates decided.

    Args:
        mode: "none", "selective" or "full" activation checkpointing, while gradients are wanted.
        every: layers of a segment whose start is kept with "full".
        tp: this rank's place, as the layers know it.
    """
    if mode == "none" or not torch.is_grad_enabled() or ctx.cache is not None:
        return _segment(layers, h, ctx, 0, len(layers))
    every = every if mode == "full" else 1
    selections = []
    for first in range(0, len(layers), every):
        h, chosen = recomputed(_segment, mode, tp, layers, h, ctx, first, min(first + every, len(layers)))
        selections += chosen
    return h, selections


def _segment(layers: nn.ModuleList, h: Tensor, ctx: Context, first: int, last: int) -> tuple[Tensor, list[Selection]]:
    """Layers first to last - 1, which run together: additions to h are outstanding between them, not behind them."""
    stream, selections = Stream(h), []
    for index in range(first, last):
        state = ctx.cache.layers[index] if ctx.cache is not None else None
        stream, selection = layers[index](stream, ctx, state)
        if selection is not None:
            selections.append(selection)
    return stream.total(), selections
