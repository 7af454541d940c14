"""Whole weights by name, one full tensor at a time, in any single process and whatever holds them.

    ExportedWeights     a folder with config.json (its `network`) and safetensors files, as `checkpoints.export_hf` and
                        `checkpoints.import_*` write it (with more in it)
    CheckpointWeights   a checkpoint of any layout, merged

None of these can execute code when it is read: tensors come from safetensors files, all else is JSON and plain YAML.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from megatron_taipan.checkpoint.calibration import read_thresholds
from megatron_taipan.checkpoint.folder import CONFIG, WEIGHTS, locate
from megatron_taipan.checkpoint.metadata import read_metadata
from megatron_taipan.checkpoint.reader import StateReader
from megatron_taipan.config import Config
from megatron_taipan.config_loading import load_config
from megatron_taipan.engine.state_shards import EMA, MASTER, MOMENTS, kinds_of
from megatron_taipan.errors import UserError
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.parameters import parameter_table
from megatron_taipan.stages import plan_stages, stage_at
from megatron_taipan.untrusted import parse_json

PREFIX = "model."  # of every tensor's name in the files, as transformers has it


class Stored(NamedTuple):
    """How the files store a tensor."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' name, such as F32
    n_bytes: int  # what belongs to it besides, such as optimizer moments, included


@dataclass
class ExportedWeights:
    """An opened folder; tensors are read when asked for."""

    path: Path
    network: ModelConfig
    _where: dict[str, Any]  # tensor name to the opened file that holds it
    training_length: int | None = None  # tokens of a sample in training; None: config.json does not say

    def names(self) -> list[str]:
        """Names of parameters and buffers, without the prefix."""
        return [name.removeprefix(PREFIX) for name in self._where]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read."""
        return tuple(self._file(name).get_slice(PREFIX + name).get_shape())

    def stored(self, name: str) -> Stored:
        """How the file stores it."""
        view = self._file(name).get_slice(PREFIX + name)
        bits = int(view.get_dtype().lstrip("BFIU"))
        return Stored(self.shape(name), view.get_dtype(), math.prod(self.shape(name)) * bits // 8)

    def load(self, name: str) -> Tensor:
        """A tensor in float32.

        Raises:
            UserError: the folder does not hold it.
        """
        return self._file(name).get_tensor(PREFIX + name).float()

    def _file(self, name: str) -> Any:
        if PREFIX + name not in self._where:
            raise UserError(f"{self.path} holds no weight {name}; the files are incomplete")
        return self._where[PREFIX + name]


@dataclass
class CheckpointWeights:
    """A checkpoint, opened; tensors are merged when asked for."""

    path: Path
    config: Config
    step: int  # optimizer steps taken
    tokens: int  # that were trained on in them
    reader: StateReader
    moments: tuple[str, ...] = ()  # of the optimizer, see `moments_of`; none in a weights-only checkpoint
    kind: str = MASTER  # what is given as the weights: they, or their average EMA

    @property
    def network(self) -> ModelConfig:
        """The network that the weights belong to."""
        return self.config.model

    @property
    def training_length(self) -> int:
        """Tokens of a sample in training."""
        return self.config.data.seq_len

    @cached_property
    def thresholds(self) -> dict[str, float]:
        """What `evaluation.calibrate` stored beside the checkpoint."""
        return read_thresholds(self.path)

    def names(self) -> list[str]:
        """Parameters in the order of the network, then buffers."""
        return [*self.reader.table, *self.reader.buffers]

    def stored(self, name: str) -> Stored:
        """How the files store it; its shape is the unsplit model's."""
        if name not in self.reader.table:
            value = self.reader.buffer(name)
            return Stored(tuple(value.shape), "F32", value.numel() * value.element_size())
        shape = self.reader.table[name].shape
        return Stored(shape, "F32", 4 * math.prod(shape) * (1 + len(self.moments_of(name))))

    def moments_of(self, name: str) -> tuple[str, ...]:
        """The moments of a parameter: of one that Muon steps only the first."""
        kept = kinds_of(self.reader.table[name], self.config.optim)
        return tuple(kind for kind in self.moments if kind in kept)

    def load_moment(self, name: str, kind: str) -> Tensor:
        """One of the optimizer's moments of a parameter, full float32."""
        return self.reader.full(name, kind)

    def load(self, name: str) -> Tensor:
        """The full float32 tensor of a parameter (its master or average), a buffer, or a calibrated threshold.

        Raises:
            UserError: the checkpoint does not hold it.
        """
        if name in self.reader.table:
            return self.reader.full(name, self.kind)
        if name in self.thresholds and self.kind == MASTER:  # found with the weights, not with their average
            return torch.tensor(self.thresholds[name])
        return self.reader.buffer(name).float()


def open_weights(path: Path, *, ema: bool = False) -> ExportedWeights | CheckpointWeights:
    """Opens a path by what it holds: an exported folder, a checkpoint, or a run's folder with checkpoints.

    Args:
        ema: take the moving average of the weights that the run kept (optim.ema_decay).

    Raises:
        UserError: it holds no weights, or they are incomplete, or no average was kept.
    """
    if not is_export(path):
        return open_checkpoint(path, ema=ema)
    if ema:
        raise UserError(f"{path} is an exported folder, which holds one set of weights; --ema takes a checkpoint")
    return open_export(path)


def is_export(path: Path) -> bool:
    """Whether a folder is an exported one, rather than a checkpoint or a run's folder of them."""
    return (path / "config.json").is_file()


def open_export(path: Path) -> ExportedWeights:
    """Opens a folder; its code, if it has any, is not run.

    Raises:
        UserError: it is not such a folder, or a file is damaged or missing.
    """
    try:
        described = parse_json((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}/config.json cannot be read: {error}") from error
    if not isinstance(described, dict) or described.get("network") is None:
        raise UserError(f"{path}/config.json describes no Taipan (it has no `network`)")
    try:
        network = ModelConfig.model_validate(described["network"])
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise UserError(f"{path}/config.json: network: {place}: {fault['msg']}") from error
    where: dict[str, Any] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            opened = safe_open(file, framework="pt")
        except Exception as error:  # the library raises its own type for damaged files
            raise UserError(f"{file} is not a complete safetensors file: {error}") from error
        where |= dict.fromkeys(opened.keys(), opened)
    if not where:
        raise UserError(f"{path} holds no .safetensors file")
    missing = [name for name in parameter_table(network) if PREFIX + name not in where]
    if missing:  # a shard that was never copied: its layers must not start from new initial values
        raise UserError(f"{path} lacks {len(missing)} tensors of its network: {', '.join(missing[:5])}")
    length = described.get("tokens_per_sample")
    return ExportedWeights(path, network, where, length if isinstance(length, int) else None)


def open_checkpoint(place: Path | str, *, ema: bool = False) -> CheckpointWeights:
    """The weights of a checkpoint, or of the newest complete one of a run's folder.

    Args:
        ema: see `open_weights`.

    Raises:
        UserError: there is none, or it is incomplete, or no average was kept.
    """
    path = locate(str(place))
    metadata = read_metadata(path)
    config = load_config(path / CONFIG)
    moments = () if metadata.get("contents") == WEIGHTS else MOMENTS
    progress, reader = metadata["progress"], StateReader(path, config.model)
    config = stage_at(plan_stages(config), progress["step"]).config  # what the weights were trained with last
    if ema and not reader.keeps(EMA):
        raise UserError(
            f"checkpoint {path} holds no average of the weights: full checkpoints of a run with optim.ema_decay do"
        )
    kind = EMA if ema else MASTER
    return CheckpointWeights(path, config, progress["step"], progress["tokens"], reader, moments, kind)
