"""Weights that a decoded token multiplies with at once, moved next to each other: one launch in place of several.

Under ZeRO they adjoin in DeepSpeed's flat buffer already (model/fused_params.py); a loaded model has each by itself.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from megatron_taipan.model.fused_params import adjoin


def make_adjacent(network: nn.Module) -> bool:
    """Moves the parameters that a module names in `read_together` into one buffer a group; names, shapes, values stay.

    Group by group, so that no more than one group is there twice. What trains is left where it is: an optimizer or a
    recorded graph may hold its memory. So is what several groups share: it cannot be next to all of its neighbours,
    and each call would move it away from the others.

    Returns:
        whether anything was moved: a graph recorded before then reads memory that is no longer the weights'.
    """
    groups = [(module, _held(module, names)) for module in network.modules() for names in _names(module)]
    uses = Counter(id(part) for _, parts in groups for part in parts)
    moved: set[nn.Module] = set()
    for module, parts in groups:
        if parts and all(uses[id(part)] == 1 for part in parts) and _movable(parts):
            _move(parts)
            moved.add(module)
    for module in moved:  # once, however many of its groups were moved
        module.register_state_dict_post_hook(_store_apart)
    if moved and torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the parts' own memory is too small for the next buffer and would be kept
    return bool(moved)


def _names(module: nn.Module) -> Sequence[Sequence[str]]:
    """The groups that a module names."""
    names: Sequence[Sequence[str]] = getattr(module, "read_together", ())
    return names


def _held(module: nn.Module, names: Sequence[str]) -> list[nn.Parameter]:
    """The parameters of these names; nothing where one of them is not a parameter."""
    parts = [getattr(module, name, None) for name in names]
    held = [part for part in parts if isinstance(part, nn.Parameter)]
    return held if len(held) == len(parts) else []


def _movable(parts: Sequence[nn.Parameter]) -> bool:
    """Whether they are plain frozen parameters of one kind that do not adjoin yet."""

    def kind(part: nn.Parameter) -> tuple:
        return part.dtype, part.device, part.shape[1:], part.is_inference()

    alike = all(type(part) is nn.Parameter and kind(part) == kind(parts[0]) for part in parts)
    return alike and not parts[0].is_meta and not any(part.requires_grad for part in parts) and not adjoin(tuple(parts))


def _move(parts: Sequence[nn.Parameter]) -> None:
    with torch.inference_mode(parts[0].is_inference()), torch.no_grad():
        buffer = torch.cat([part.data for part in parts])
        for part, rows in zip(parts, buffer.split([len(part) for part in parts]), strict=True):
            part.data = rows


def _store_apart(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Gives what was moved a storage of its own in a state_dict, over the same memory: accelerate's `save_model` would
    take parts of one storage for one tensor and leave out all but the first, safetensors' refuses them."""
    for names in _names(module):
        for name in names:
            part = state_dict.get(prefix + name)
            if type(part) is Tensor and not part.is_meta and part.untyped_storage().nbytes() > part.nbytes:
                state_dict[prefix + name] = torch.from_dlpack(part)
