"""A model that never holds more than one layer's weights: they are read as the forward pass comes to it.

So a model of any size is computed in the memory of its largest tensors. The weights are read once for each forward
pass, so this is for checks, not for use. The file imports nothing of this package: `reload_folder.py`, which must not,
uses it too.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def stream(network: Any, load: Callable[[str], Tensor]) -> None:
    """Makes every forward pass of `network` read its weights by itself.

    Args:
        network: a `Taipan` on the meta device: embedding, layers, final_norm, head.
        load: gives a parameter or buffer by its name in the network, in the type that it is computed in.
    """
    resident = not isinstance(getattr(network.head, "weight", None), Tensor)  # the head uses the embedding's weight
    parts = [("embedding.", network.embedding), ("final_norm.", network.final_norm), ("head.", network.head)]
    parts += [(f"layers.{index}.", layer) for index, layer in enumerate(network.layers)]
    for prefix, part in parts:
        part.register_forward_pre_hook(lambda module, _, prefix=prefix: fill(module, prefix, load))
        if not (resident and part is network.embedding):
            part.register_forward_hook(lambda module, *_: empty(module))


def fill(module: nn.Module, prefix: str, load: Callable[[str], Tensor]) -> None:
    """Gives every parameter and buffer that is on the meta device its value."""
    for owner, name, full, tensor in _tensors(module):
        if tensor.is_meta:
            value = load(prefix + full)
            if value.shape != tensor.shape:
                raise ValueError(f"{prefix}{full} has shape {tuple(value.shape)}, not {tuple(tensor.shape)}")
            _put(owner, name, value)


def empty(module: nn.Module) -> None:
    """Takes the values away again."""
    for owner, name, _, tensor in _tensors(module):
        _put(owner, name, torch.empty_like(tensor, device="meta"))


def _tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
    """Owner, name in the owner, name in the module, and the tensor itself."""
    for path, owner in list(module.named_modules()):
        for name, tensor in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            yield owner, name, f"{path}.{name}" if path else name, tensor


def _put(owner: nn.Module, name: str, value: Tensor) -> None:
    """In the place of the parameter or buffer of that name."""
    is_parameter = isinstance(getattr(owner, name), nn.Parameter)
    setattr(owner, name, nn.Parameter(value, requires_grad=False) if is_parameter else value)
