"""The whole model out of a checkpoint of any layout: one full float32 tensor at a time, in any single process."""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from megatron_taipan.checkpoint.calibration import read_thresholds
from megatron_taipan.checkpoint.folder import CONFIG, WEIGHTS, locate, read_metadata
from megatron_taipan.checkpoint.reader import StateReader
from megatron_taipan.checkpoint.weights import Stored
from megatron_taipan.config import Config, ModelConfig, load_config
from megatron_taipan.engine.state_shards import MASTER, MOMENTS


def open_state(place: Path | str) -> "TrainedState":
    """The state of a checkpoint, or of the newest complete one of a run's folder.

    Raises:
        UserError: there is none, or it is incomplete.
    """
    path = locate(str(place))
    metadata = read_metadata(path)
    config = load_config(path / CONFIG)
    moments = () if metadata.get("contents") == WEIGHTS else MOMENTS
    progress = metadata["progress"]
    return TrainedState(path, config, progress["step"], progress["tokens"], StateReader(path, config.model), moments)


def load_state(place: Path | str) -> dict[str, Tensor]:
    """Every parameter and buffer of a checkpoint by full name, full float32 tensors; see `open_state`."""
    state = open_state(place)
    return {name: state.load(name) for name in state.names()}


@dataclass
class TrainedState:
    """A checkpoint, opened; tensors are merged when asked for."""

    path: Path
    config: Config
    step: int  # optimizer steps taken
    tokens: int  # that were trained on in them
    reader: StateReader
    moments: tuple[str, ...] = ()  # of the optimizer; none in a weights-only checkpoint

    @property
    def network(self) -> ModelConfig:
        """The network that the weights belong to."""
        return self.config.model

    @cached_property
    def thresholds(self) -> dict[str, float]:
        """What `evaluation.calibrate` stored beside the checkpoint."""
        return read_thresholds(self.path)

    def names(self) -> list[str]:
        """Parameters in the order of the network, then buffers."""
        return [*self.reader.table, *self.reader.buffers]

    def stored(self, name: str) -> Stored:
        """How it lies in the files; its shape is the unsplit model's."""
        if name not in self.reader.table:
            value = self.reader.buffer(name)
            return Stored(tuple(value.shape), "F32", value.numel() * value.element_size())
        shape = self.reader.table[name].shape
        return Stored(shape, "F32", 4 * math.prod(shape) * (1 + len(self.moments)))

    def load_moment(self, name: str, kind: str) -> Tensor:
        """One of the optimizer's moments of a parameter, full float32."""
        return self.reader.full(name, kind)

    def load(self, name: str) -> Tensor:
        """The full float32 tensor of a parameter (its master) or buffer, a calibrated threshold if there is one.

        Raises:
            UserError: the checkpoint does not hold it.
        """
        if name in self.reader.table:
            return self.reader.full(name, MASTER)
        if name in self.thresholds:
            return torch.tensor(self.thresholds[name])
        return self.reader.buffer(name).float()
