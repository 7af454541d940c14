"""Finding the layer that first produced a value that is not finite."""

from typing import Any

import torch
from torch import Tensor, nn

from megatron_taipan.engine.protocol import Engine
from megatron_taipan.engine.readback import send
from megatron_taipan.parallel.all_ranks import gather_objects
from megatron_taipan.train.schedule import GateStep
from megatron_taipan.train.step import Batch


def first_not_finite(engine: Engine, batches: list[Batch], *, step: int, gate: GateStep | None = None) -> str:
    """Repeats a skipped step's forward passes and names the first module whose output is not finite; collective.

    The gate's noise depends on counters alone, so the passes are the same ones. Returns a sentence, the same on every
    rank.
    """
    ours: tuple[int, int, str] | None = None  # micro-batch, place among the modules that ran, sentence
    settings = None if gate is None else send(gate.vector(), batches[0]["tokens"].device).float()
    for number, batch in enumerate(batches):
        found = _first_module(engine, batch, step, settings)
        if found is not None and ours is None:
            samples = batch["sample"].tolist()
            place, name = found
            ours = number, place, f"{name} (micro-batch {number}, samples {samples[0]} to {samples[-1]})"
    places = [(*found, rank) for rank, found in enumerate(gather_objects(ours)) if found is not None]
    if places:
        # Stages count their own modules, and earlier ones have lower ranks. Of ranks with the same modules a lower one
        # may have a later fault by way of the other: the gates' share of the row is a sum over its pieces.
        staged = hasattr(engine.module, "modules_by_full_name")
        _, _, where, rank = places[0] if staged else min(places, key=lambda found: (found[0], found[1], found[3]))
        return f"the first values that are not finite came out of {where} on rank {rank}"
    return "every layer's output is finite, so it is the gradient that overflowed"


@torch.no_grad()
def _first_module(engine: Engine, batch: Batch, step: int, gate: Tensor | None) -> tuple[int, str] | None:
    """The innermost module that first produced a value that is not finite, and how many had run before it; None if all
    are finite."""
    found: list[tuple[int, str]] = []
    ran = 0
    handles = []
    network = engine.module
    for name, module in getattr(network, "modules_by_full_name", network.named_modules)():  # the first: a stage's
        if name:

            def look(module: nn.Module, arguments: Any, output: Any, name: str = name) -> None:
                nonlocal ran
                if not found and any(not bool(t.isfinite().all()) for t in tensors(output)):
                    found.append((ran, name))
                ran += 1

            handles.append(module.register_forward_hook(look))
    try:
        loss = _pass_again(engine, batch, step, gate)
    finally:
        for handle in handles:
            handle.remove()
    if not found and not bool(torch.isfinite(loss)):
        return ran, "the loss"
    return found[0] if found else None


def _pass_again(engine: Engine, batch: Batch, step: int, gate: Tensor | None) -> Tensor:
    """One micro-batch's forward pass; its loss, 0 on a stage without the head."""
    if hasattr(engine.module, "modules_by_full_name"):
        from megatron_taipan.engine.pipeline import repeat_forward, staged

        return repeat_forward(staged(engine), batch, step=step, gate=gate)[0]
    return engine(
        batch["tokens"], labels=batch["labels"], loss_mask=batch["loss_mask"], seq_idx=batch["seq_idx"],
        samples=batch["sample"], document_start=batch.get("document_start"), step=step, ce_scale=1.0, gate=gate,
    ).loss  # fmt: skip


def tensors(value: Any) -> list[Tensor]:
    """All floating-point tensors in nested tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [t for item in value for t in tensors(item)]
    return []
