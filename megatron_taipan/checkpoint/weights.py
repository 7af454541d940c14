"""Weights without a training state: a folder with config.json (its `network`) and safetensors files.

`checkpoints.export_hf` writes such folders (with more in them), `checkpoints.import_*` too. A run starts from one with
`checkpoint.init=FOLDER`, in any layout: each rank takes its shard of every tensor, one tensor at a time.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_taipan.config import ModelConfig
from megatron_taipan.errors import UserError
from megatron_taipan.parallel.groups import TensorParallel
from megatron_taipan.parallel.layout import describe, take_shard

PREFIX = "model."  # of every tensor's name in the files, as transformers has it


@dataclass
class Weights:
    """An opened folder; tensors are read when asked for."""

    path: Path
    network: ModelConfig
    _where: dict[str, Any]  # tensor name to the opened file that holds it

    def names(self) -> list[str]:
        """Names of parameters and buffers, without the prefix."""
        return [name.removeprefix(PREFIX) for name in self._where]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, which is not read."""
        return tuple(self._file(name).get_slice(PREFIX + name).get_shape())

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


def open_weights(path: Path) -> Weights:
    """Opens a folder; its code, if it has any, is not run.

    Raises:
        UserError: it is not such a folder, or a file is damaged.
    """
    try:
        network = json.loads((path / "config.json").read_text(encoding="utf-8")).get("network")
    except (OSError, ValueError) as error:
        raise UserError(f"{path}/config.json cannot be read: {error}") from error
    if network is None:
        raise UserError(f"{path}/config.json describes no Taipan (it has no `network`)")
    where: dict[str, Any] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            opened = safe_open(file, framework="pt")
        except Exception as error:  # the library raises its own type for damaged files
            raise UserError(f"{file} is no whole safetensors file: {error}") from error
        where |= dict.fromkeys(opened.keys(), opened)
    if not where:
        raise UserError(f"{path} holds no .safetensors file")
    return Weights(path, ModelConfig.model_validate(network), where)


class Network(Protocol):
    """What is asked of a model here (`megatron_taipan.model.taipan.Taipan`)."""

    config: ModelConfig
    tp: TensorParallel

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]: ...

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...


@torch.no_grad()
def load_weights(model: Network, path: Path) -> None:
    """Fills a model, or one tensor rank's part of it, with the weights of a folder.

    Raises:
        UserError: the folder's network has other layers or sizes.
    """
    weights = open_weights(path)
    ours, theirs = describe(model.config), describe(weights.network)
    if model.config.letters != weights.network.letters:
        raise UserError(
            f"checkpoint.init={path} has the layers {weights.network.letters}, model.pattern gives"
            f" {model.config.letters}; convert with checkpoints.import_hf --config"
        )
    for name, spec in ours.items():
        if name not in theirs or theirs[name].shape != spec.shape:
            other = list(theirs[name].shape) if name in theirs else "absent"
            raise UserError(f"checkpoint.init={path}: {name} is {other}, this model's is {list(spec.shape)}")
    split = describe(model.config, model.tp.size)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        full = weights.load(name)
        tensor.copy_(take_shard(full, split[name], model.tp.size, model.tp.rank) if name in split else full)
