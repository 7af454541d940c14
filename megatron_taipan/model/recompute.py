"""Activation checkpointing: what is kept for the backward pass, and what is computed again."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

# Matrix products with weights: dear to recompute, and their outputs are what a block cannot do without.
KEPT = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def recomputed(run: Callable[..., Any], mode: str, *args: Any) -> Any:
    """run(*args), storing less for the backward pass.

    Args:
        mode: "full" stores the arguments only; "selective" also the outputs of matrix products with weights, so that
            norms, convolution, scan and attention are computed again. Both re-enter nothing (use_reentrant=False);
            the gate's noise is a hash and comes out the same.
    """
    if mode == "full":
        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)
    contexts = partial(create_selective_checkpoint_contexts, list(KEPT))
    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
