"""Activation checkpointing: what is kept for the backward pass, and what is computed again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megatron_taipan.model.context import Context
from megatron_taipan.model.gate import Selection
from megatron_taipan.model.stream import Stream
from megatron_taipan.parallel.tensor import TensorParallel

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
    run = tp.recompute_cache.checkpointed(run)
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_products_contexts)


class _Products(TorchDispatchMode):
    """Keeps what KEPT_OPERATORS give in the first pass, and gives it in their place, in that order, in the second.

    torch's create_selective_checkpoint_contexts counts every operator, those of ZeRO-3's gathering and freeing of
    weights too: how many there are depends on what ran before, and after a validation its second pass failed.
    """

    def __init__(self, kept: list[tuple[Tensor, int] | None], first: bool):
        super().__init__()
        self.kept, self.first, self.given = kept, first, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in KEPT_OPERATORS:
            return func(*args, **(kwargs or {}))
        if self.first:
            out = func(*args, **(kwargs or {}))
            self.kept.append((out.detach(), out._version))  # detached: autograd hangs the graph, and so us, on out
            return out
        place = self.given
        entry = self.kept[place] if place < len(self.kept) else None
        if entry is None:
            raise RuntimeError(f"matrix product {place} of a recomputed layer was not kept, or was already taken")
        out, version = entry
        if out._version != version:
            raise RuntimeError(f"matrix product {place} of a recomputed layer was changed in place after it was kept")
        self.kept[place] = None  # the layer's backward pass frees it
        self.given += 1
        return out


def _products_contexts() -> tuple[_Products, _Products]:
    """For both passes of one checkpointed call."""
    kept: list[tuple[Tensor, int] | None] = []
    return _Products(kept, first=True), _Products(kept, first=False)


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
