"""Anything that holds weights, opened: a checkpoint of any layout, an exported folder, a folder of weights."""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megatron_taipan.checkpoint.identity import flatten
from megatron_taipan.checkpoint.merge import TrainedState, open_state
from megatron_taipan.checkpoint.weights import Weights, open_weights
from megatron_taipan.config import ModelConfig


class Opened(Protocol):
    """Full tensors by name."""

    path: Path

    def names(self) -> list[str]: ...

    def load(self, name: str) -> Tensor: ...


def open_any(path: Path) -> Weights | TrainedState:
    """Opens a path by what lies in it.

    Raises:
        UserError: it holds no weights, or they are incomplete.
    """
    return open_weights(path) if (path / "config.json").is_file() else open_state(path)


def network_of(opened: Weights | TrainedState) -> ModelConfig:
    """The network that the weights belong to."""
    return opened.network if isinstance(opened, Weights) else opened.config.model


def settings_of(opened: Weights | TrainedState) -> dict[str, Any]:
    """All that is known about how the weights came to be, by dotted name."""
    if isinstance(opened, Weights):
        return flatten({"model": opened.network.model_dump(mode="json")})
    return flatten(opened.config.model_dump(mode="json")) | {"step": opened.step}
