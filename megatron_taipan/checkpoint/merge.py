"""The whole model out of a checkpoint of any layout: one full float32 tensor at a time, in any single process."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from megatron_taipan.checkpoint.calibration import read_thresholds
from megatron_taipan.checkpoint.folder import CONFIG, locate, read_metadata
from megatron_taipan.checkpoint.pieces import MASTER
from megatron_taipan.checkpoint.reader import StateReader
from megatron_taipan.config import Config, load_config


def open_state(place: Path | str) -> "TrainedState":
    """The state of a checkpoint, or of the newest complete one of a run's folder.

    Raises:
        UserError: there is none, or it is incomplete.
    """
    path = locate(str(place))
    metadata = read_metadata(path)
    config = load_config(path / CONFIG)
    return TrainedState(path, config, metadata["progress"]["step"], StateReader(path, config.model))


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
    reader: StateReader

    @cached_property
    def thresholds(self) -> dict[str, float]:
        """What `evaluation.calibrate` stored beside the checkpoint."""
        return read_thresholds(self.path)

    def names(self) -> list[str]:
        """Parameters in the order of the network, then buffers."""
        return [*self.reader.table, *self.reader.buffers]

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
