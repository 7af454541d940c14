"""Reading the state of a checkpoint piece by piece, for any layout.

    state/index.json               which file holds which elements of which parameter
    state/rank_00000.safetensors   one file a process: `NAME|master`, `NAME|exp_avg`, `NAME|exp_avg_sq`, each a run of
                                   elements of the flattened parameter, float32; `NAME|buffer` in the files of rank 0

The files are mapped, never read whole, and cannot hold code.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from megatron_taipan.checkpoint.folder import STATE
from megatron_taipan.config import ModelConfig
from megatron_taipan.errors import UserError
from megatron_taipan.parallel.layout import ParamSpec, describe, merge_shards, take_shard

INDEX = f"{STATE}/index.json"


@dataclass(frozen=True)
class Run:
    """Where a run of a parameter's elements lies."""

    file: str
    tensor_rank: int
    start: int
    count: int


@dataclass
class StateReader:
    """An opened state.

    Args:
        path: the checkpoint's folder.
        model: the network it was saved from.
    """

    path: Path
    model: ModelConfig
    _files: dict[str, Any] = field(default_factory=dict)
    _last_full: tuple[tuple[str, str], Tensor] | None = None

    def __post_init__(self) -> None:
        try:
            index = json.loads((self.path / INDEX).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path / INDEX} cannot be read: {error}") from error
        self.tensor: int = index["tensor"]
        self.optimizer_step: int = index["optimizer_step"]
        self.scaler: dict[str, float] | None = index["scaler"]
        self.buffers: dict[str, str] = index["buffers"]
        self.runs = {name: [Run(*run) for run in runs] for name, runs in index["parameters"].items()}
        self.table = describe(self.model, self.tensor)

    def full(self, name: str, kind: str) -> Tensor:
        """The whole parameter (or moment), float32, in the shape of the unsplit model.

        Raises:
            UserError: the checkpoint does not hold all of it.
        """
        if self._last_full is not None and self._last_full[0] == (name, kind):
            return self._last_full[1]
        spec = self._spec(name)
        shape = spec.local_shape(self.tensor)
        ranks = range(self.tensor if spec.split is not None else 1)
        shards = [self._elements(name, kind, rank, 0, torch.Size(shape).numel()).view(shape) for rank in ranks]
        whole = merge_shards(shards, spec) if spec.split is not None else shards[0]
        self._last_full = ((name, kind), whole)
        return whole

    def elements(self, name: str, kind: str, spec: ParamSpec, size: int, rank: int, start: int, count: int) -> Tensor:
        """Elements of the flattened shard that tensor rank `rank` of `size` holds, whatever sizes they were saved from.

        Args:
            spec: the parameter's row in the table for `size` ranks.
        """
        saved = self._spec(name)
        if saved.split == spec.split and (size == self.tensor or spec.split is None):
            return self._elements(name, kind, rank if spec.split is not None else 0, start, count)
        return take_shard(self.full(name, kind), spec, size, rank).view(-1)[start : start + count]

    def buffer(self, name: str) -> Tensor:
        """A buffer as it was saved."""
        if name not in self.buffers:
            raise UserError(f"checkpoint {self.path} holds no {name}")
        return self._file(self.buffers[name]).get_tensor(f"{name}|buffer")

    def _elements(self, name: str, kind: str, tensor_rank: int, start: int, count: int) -> Tensor:
        """Elements start to start + count of one saved tensor rank's flattened shard."""
        out, found = torch.empty(count), 0
        for run in self.runs[name]:
            first, last = max(run.start, start), min(run.start + run.count, start + count)
            if run.tensor_rank == tensor_rank and first < last:
                slices = self._file(run.file).get_slice(f"{name}|{kind}")
                out[first - start : last - start] = slices[first - run.start : last - run.start]
                found += last - first
        if found != count:
            raise UserError(f"checkpoint {self.path}: {name} ({kind}) has {found} of {count} elements on tensor rank"
                            f" {tensor_rank}")  # fmt: skip
        return out

    def _spec(self, name: str) -> ParamSpec:
        if name not in self.runs or name not in self.table:
            raise UserError(f"checkpoint {self.path} holds no {name}")
        return self.table[name]

    def _file(self, name: str) -> Any:
        if name not in self._files:
            try:
                self._files[name] = safe_open(self.path / STATE / name, framework="pt")
            except Exception as error:  # the library raises its own type for damaged files
                raise UserError(f"{self.path / STATE / name} is no whole safetensors file: {error}") from error
        return self._files[name]
