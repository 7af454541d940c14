"""Activation checkpointing as a run is configured: what is kept for the backward pass, what is computed again."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from megatron_taipan.model.stack import Recompute, recompute_all
from megatron_taipan.parallel.tensor import TensorParallel

# Matrix products with weights: expensive to recompute, and a block cannot run without their outputs.
KEPT_OPERATORS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def recompute_of(mode: str, every: int, tp: TensorParallel) -> Recompute | None:
    """What a configuration asks for; None: everything is kept.

    Args:
        mode: "none"; "full" stores what a segment of `every` layers begins with; "selective", layer by layer, also the
            outputs of matrix products with weights, together with what is sent for them between tensor ranks, so that
            norms, convolution, scan and attention are computed again.
        tp: this rank's place; holds what is kept of products that include communication.
    """
    if mode == "none":
        return None
    return Recompute(recompute_all, every) if mode == "full" else Recompute(partial(recompute_selected, tp))


def recompute_selected(tp: TensorParallel, run: Callable[..., Any], *args: Any) -> Any:
    """run(*args), storing the arguments and the products with weights. It re-enters nothing (use_reentrant=False)."""
    run = tp.recompute_cache.checkpointed(run)
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, context_fn=_products_contexts)


class _Products(TorchDispatchMode):
    """Keeps the outputs of KEPT_OPERATORS in the first pass, and returns them in that order in the second.

    torch's create_selective_checkpoint_contexts counts every operator, also those of ZeRO-3's gathering and freeing of
    weights: how many there are depends on what ran before, and after a validation its second pass failed.
    """

    def __init__(self, kept: list[tuple[Tensor, int] | None], first: bool):
        super().__init__()
        self.kept, self.first, self.given = kept, first, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in KEPT_OPERATORS:
            return func(*args, **(kwargs or {}))
        if self.first:
            out = func(*args, **(kwargs or {}))
            self.kept.append((out.detach(), out._version))  # detached: `out` holds the graph, and so this object
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
