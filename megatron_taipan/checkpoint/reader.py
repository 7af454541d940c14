"""Reading the state of a checkpoint shard by shard, for any layout.

    state/index.json               which file holds which elements of which parameter
    state/rank_00000.safetensors   one file a process: `NAME|master`, `NAME|exp_avg`, `NAME|exp_avg_sq`, each a run of
                                   elements of the flattened parameter, float32; `NAME|buffer` in the files of rank 0;
                                   `NAME|random` states of the process's random number generators

The files are mapped, never read whole, and cannot hold code.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_taipan.checkpoint.folder import STATE
from megatron_taipan.engine.state_shards import SCALER_FIELDS
from megatron_taipan.errors import UserError
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.param_spec import ParamSpec
from megatron_taipan.parameters import parameter_table, put_shard, take_shard
from megatron_taipan.section import faults
from megatron_taipan.untrusted import plain_name

INDEX = f"{STATE}/index.json"
READ_ELEMENTS = 1 << 24  # at a time


def _beside(name: str) -> str:
    if not plain_name(name):
        raise ValueError(f"{name[:200]!r} is not the name of a file beside it")
    return name


Count = Annotated[int, Field(ge=0)]
FileName = Annotated[str, AfterValidator(_beside)]


class _Index(BaseModel):
    """What the index holds."""

    model_config = ConfigDict(strict=True)

    tensor: int = Field(ge=1)
    processes: Count = 0
    optimizer_step: Count
    scaler: dict[str, int | float] | None
    buffers: dict[str, FileName]
    parameters: dict[str, list[tuple[FileName, Count, Count, Count]]]  # each as a Run

    @field_validator("scaler")
    @classmethod
    def _whole(cls, scaler: dict[str, int | float] | None) -> dict[str, int | float] | None:
        if scaler is not None and (missing := set(SCALER_FIELDS) - scaler.keys()):
            raise ValueError(f"lacks {', '.join(sorted(missing))}")
        return scaler


def _read_index(path: Path) -> _Index:
    """
    Raises:
        UserError: it is missing or damaged, or names a file in another folder.
    """
    try:
        return _Index.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise UserError(f"{path} is damaged: {faults(error)}") from error


@dataclass(frozen=True)
class Run:
    """Where a run of a parameter's elements is."""

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
    _last_shard: tuple[tuple[str, str, int, int], Tensor] | None = None
    _last_full: tuple[tuple[str, str], Tensor] | None = None

    def __post_init__(self) -> None:
        index = _read_index(self.path / INDEX)
        self.tensor, self.processes = index.tensor, index.processes
        self.optimizer_step, self.scaler, self.buffers = index.optimizer_step, index.scaler, index.buffers
        self.runs = {name: [Run(*run) for run in runs] for name, runs in index.parameters.items()}
        self.table = parameter_table(self.model, self.tensor)

    def full(self, name: str, kind: str) -> Tensor:
        """The whole parameter (or moment), float32, in the shape of the unsplit model.

        Raises:
            UserError: the checkpoint does not hold all of it.
        """
        if self._last_full is not None and self._last_full[0] == (name, kind):
            return self._last_full[1]
        self._last_full = None  # two of them are never in memory
        spec = self._spec(name)
        shape = spec.local_shape(self.tensor)
        whole = torch.empty(spec.shape)
        for rank in range(self.tensor if spec.split is not None else 1):
            shard = self._elements(name, kind, rank, 0, torch.Size(shape).numel()).view(shape)
            if shard.shape == whole.shape:
                whole = shard
            else:
                put_shard(whole, shard, spec, rank)
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
        asked = (name, kind, size, rank)
        if self._last_shard is None or self._last_shard[0] != asked:
            self._last_shard = None
            self._last_shard = (asked, take_shard(self.full(name, kind), spec, size, rank).view(-1))
        return self._last_shard[1][start : start + count]

    def keeps(self, kind: str) -> bool:
        """Whether the checkpoint has this of its parameters, such as the average of the weights."""
        name, runs = next(iter(self.runs.items()))
        return f"{name}|{kind}" in self._file(runs[0].file).keys()

    def buffer(self, name: str) -> Tensor:
        """A buffer as it was saved."""
        if name not in self.buffers:
            raise UserError(f"checkpoint {self.path} holds no {name}")
        return self._whole(self.buffers[name], f"{name}|buffer")

    def random_states(self, rank: int) -> dict[str, Tensor]:
        """States of random number generators for a process; one of more processes than saved takes another's."""
        if not self.processes:
            return {}
        file_name = f"rank_{rank % self.processes:05d}.safetensors"
        names = [name for name in self._file(file_name).keys() if name.endswith("|random")]
        return {name.removesuffix("|random"): self._whole(file_name, name) for name in names}

    def _whole(self, file: str, name: str) -> Tensor:
        try:
            return torch.from_numpy(self._file(file).get_tensor(name))
        except (SafetensorError, TypeError, ValueError) as error:  # of a type that numpy does not have, too
            raise UserError(f"{self.path / STATE / file} is damaged: {name}: {error}") from error

    def _elements(self, name: str, kind: str, tensor_rank: int, start: int, count: int) -> Tensor:
        """Elements start to start + count of one saved tensor rank's flattened shard."""
        out, found = torch.empty(count), 0
        for run in self.runs[name]:
            first, last = max(run.start, start), min(run.start + run.count, start + count)
            if run.tensor_rank == tensor_rank and first < last:
                try:
                    slices = self._file(run.file).get_slice(f"{name}|{kind}")
                except SafetensorError as error:
                    raise UserError(f"{self.path / STATE / run.file} is damaged: {error}") from error
                if (slices.get_shape(), slices.get_dtype()) != ([run.count], "F32"):
                    raise UserError(
                        f"{self.path / STATE / run.file} is damaged: {name}|{kind} is {slices.get_dtype()} of shape"
                        f" {slices.get_shape()}, and the index says F32 of shape {[run.count]}"
                    )
                for at in range(first, last, READ_ELEMENTS):  # a slice is a copy
                    end = min(at + READ_ELEMENTS, last)
                    out[at - start : end - start] = torch.from_numpy(slices[at - run.start : end - run.start])
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
                # "pt" would ask the system for memory of the file's size, which may exceed what there is; "np" maps it
                self._files[name] = safe_open(self.path / STATE / name, framework="np")
            except Exception as error:  # the library raises its own type for damaged files
                raise UserError(f"{self.path / STATE / name} is not a complete safetensors file: {error}") from error
        return self._files[name]
