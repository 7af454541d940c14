"""Weights that a decoded token multiplies with at once, moved next to each other: one launch in place of several.

Under ZeRO they adjoin in DeepSpeed's flat buffer already (model/fused_params.py); a loaded model has each by itself.
"""

from collections.abc import Sequence

import torch
from torch import nn

from megatron_taipan.model.fused_params import adjoin


def make_adjacent(network: nn.Module) -> None:
    """Moves the parameters that a module names in `read_together` into one buffer a group; names, shapes, values stay.

    Group by group, so that no more than one group is there twice. What trains is left where it is: an optimizer or a
    recorded graph may hold its memory.
    """
    moved = False
    for module in network.modules():
        for names in getattr(module, "read_together", ()):
            parts = [getattr(module, name, None) for name in names]
            held = [part for part in parts if isinstance(part, nn.Parameter)]
            if len(held) == len(parts) and _movable(held):
                _move(held)
                moved = True
    if moved and torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the parts' own memory is too small for the next buffer and would be kept


def _movable(parts: Sequence[nn.Parameter]) -> bool:
    """Whether they are plain frozen parameters of one kind that do not adjoin yet."""
    first = parts[0]
    alike = all(
        type(part) is nn.Parameter
        and (part.dtype, part.device, part.shape[1:]) == (first.dtype, first.device, first.shape[1:])
        for part in parts
    )
    return alike and not first.is_meta and not any(part.requires_grad for part in parts) and not adjoin(tuple(parts))


def _move(parts: Sequence[nn.Parameter]) -> None:
    with torch.inference_mode(parts[0].is_inference()), torch.no_grad():
        buffer = torch.cat([part.data for part in parts])
        for part, rows in zip(parts, buffer.split([len(part) for part in parts]), strict=True):
            part.data = rows
