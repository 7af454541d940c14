"""Weights without a training state: a folder with config.json (its `network`) and safetensors files.

`checkpoints.export_hf` writes such folders (with more in them), `checkpoints.import_*` too. A run starts from one with
`checkpoint.init=FOLDER`, in any layout: each rank takes its shard of every tensor, one tensor at a time.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError
from safetensors import safe_open
from torch import Tensor

from megatron_taipan.config import ModelConfig
from megatron_taipan.errors import UserError
from megatron_taipan.parameters import parameter_table
from megatron_taipan.untrusted import parse_json

PREFIX = "model."  # of every tensor's name in the files, as transformers has it


class Stored(NamedTuple):
    """How a tensor lies in the files."""

    shape: tuple[int, ...]
    dtype: str  # safetensors' name, such as F32
    n_bytes: int  # what belongs to it besides, such as optimizer moments, included


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

    def stored(self, name: str) -> Stored:
        """How it lies in the file."""
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


def open_weights(path: Path) -> Weights:
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
            raise UserError(f"{file} is no whole safetensors file: {error}") from error
        where |= dict.fromkeys(opened.keys(), opened)
    if not where:
        raise UserError(f"{path} holds no .safetensors file")
    missing = [name for name in parameter_table(network) if PREFIX + name not in where]
    if missing:  # a shard that was never copied: nobody wants its layers drawn anew
        raise UserError(f"{path} lacks {len(missing)} tensors of its network: {', '.join(missing[:5])}")
    return Weights(path, network, where)
