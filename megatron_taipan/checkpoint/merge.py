"""The whole model out of a checkpoint's shards: one full float32 tensor at a time, in any single process.

DeepSpeed (0.19) leaves, below `state/`, for each tensor rank T and data rank D

    stage 0      mp_rank_TT_model_states.pt                      `module`: parameters and buffers
    stages 1, 2  the same, and zero_pp_rank_D_mp_rank_TT_optim_states.pt
                 `single_partition_of_fp32_groups`: float32 masters, flat, D's part of each parameter group
                 `param_slice_mappings`: where a parameter's part lies in it
    stage 3      zero_pp_rank_D_mp_rank_TT_{model,optim}_states.pt
                 `fp32_flat_groups`: every parameter cut into D equal parts, padded, one after the other

The float32 masters are preferred to the parameters, which may be bf16. Files are mapped, not read, and loaded with
`weights_only`: they cannot execute code. Tensor shards are joined by the layout table.
"""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_taipan.checkpoint.folder import CONFIG, STATE, locate, read_metadata
from megatron_taipan.config import Config, load_config
from megatron_taipan.errors import UserError
from megatron_taipan.parallel.layout import describe, merge_shards

# What DeepSpeed pickles beside tensors, each replaced by something inert.
DEEPSPEED_TYPES: list[Any] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (SimpleNamespace, "deepspeed.utils.tensor_fragment.fragment_address"),
    (SimpleNamespace, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (SimpleNamespace, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
]


def open_state(place: Path | str) -> "TrainedState":
    """The state of a checkpoint, or of the newest complete one of a run's folder.

    Raises:
        UserError: there is none, it is incomplete, or its layout cannot be merged.
    """
    path = locate(str(place))
    metadata = read_metadata(path)
    config = load_config(path / CONFIG)
    if config.parallel.pipeline > 1:
        raise UserError(f"{path} was saved with parallel.pipeline={config.parallel.pipeline}; only 1 can be merged")
    return TrainedState(path, config, metadata["progress"]["step"], metadata["identity"]["layout.data"])


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
    data_size: int  # data-parallel ranks that wrote it
    _files: dict[str, Any] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Parameters in the order of the network, then buffers."""
        return [*self._table, *self._module(0).get("buffer_names", ())]

    def load(self, name: str) -> Tensor:
        """The full float32 tensor of a parameter or buffer.

        Raises:
            UserError: the checkpoint does not hold it.
        """
        if name not in self._table:
            buffers = self._module(0)["module"]
            if name not in buffers:
                raise UserError(f"checkpoint {self.path} holds no {name}")
            return buffers[name].float()
        shards = [self._shard(name, tensor_rank) for tensor_rank in range(self.tensor_size)]
        return merge_shards(shards, self._table[name])

    @property
    def tensor_size(self) -> int:
        return self.config.parallel.tensor

    @cached_property
    def _table(self) -> dict:
        return describe(self.config.model, self.tensor_size)

    def _shard(self, name: str, tensor_rank: int) -> Tensor:
        """One tensor rank's float32 parameter."""
        stage = self.config.parallel.zero_stage
        if stage == 0:
            return self._module(tensor_rank)["module"][name].float()
        shape = self._shape(name, tensor_rank)
        if stage == 3:
            parts = [self._equal_part(name, tensor_rank, rank) for rank in range(self.data_size)]
            return torch.cat(parts)[: shape.numel()].view(shape)
        parts = [self._fragment(name, tensor_rank, rank) for rank in range(self.data_size)]
        flat = torch.cat([part for part in parts if part is not None])
        if flat.numel() != shape.numel():
            raise UserError(f"checkpoint {self.path}: {name} has {flat.numel()} elements of {shape.numel()}")
        return flat.view(shape)

    def _fragment(self, name: str, tensor_rank: int, rank: int) -> Tensor | None:
        """Stages 1 and 2: what data rank `rank` holds of a parameter, if anything."""
        optimizer = self._optimizer(tensor_rank, rank)
        groups = optimizer["single_partition_of_fp32_groups"]
        for flat, mapping in zip(groups, optimizer["param_slice_mappings"], strict=True):
            if name in mapping:
                return flat.narrow(0, mapping[name].start, mapping[name].numel)
        return None

    def _equal_part(self, name: str, tensor_rank: int, rank: int) -> Tensor:
        """Stage 3: data rank `rank`'s part of a parameter, the last one padded."""
        start = 0
        for other, shape in self._all_shapes(tensor_rank).items():
            count = -(-shape.numel() // self.data_size)
            if other == name:
                return self._flat(tensor_rank, rank).narrow(0, start, count)
            start += count
        raise UserError(f"checkpoint {self.path} holds no {name}")

    def _flat(self, tensor_rank: int, rank: int) -> Tensor:
        key = f"flat {tensor_rank} {rank}"
        if key not in self._files:
            self._files[key] = torch.cat(self._optimizer(tensor_rank, rank)["fp32_flat_groups"])
        return self._files[key]

    def _shape(self, name: str, tensor_rank: int) -> torch.Size:
        shapes = self._all_shapes(tensor_rank)
        if name not in shapes:
            raise UserError(f"checkpoint {self.path} holds no {name}")
        return shapes[name]

    def _all_shapes(self, tensor_rank: int) -> dict[str, torch.Size]:
        """Parameters of one tensor rank in the order of the optimizer's groups."""
        groups = self._module(tensor_rank)["param_shapes"]
        return {name: shape for group in groups for name, shape in group.items()}

    def _module(self, tensor_rank: int) -> dict[str, Any]:
        part = "zero_pp_rank_0_" if self.config.parallel.zero_stage == 3 else ""
        return self._read(f"{part}mp_rank_{tensor_rank:02d}_model_states.pt")

    def _optimizer(self, tensor_rank: int, rank: int) -> dict[str, Any]:
        name = f"zero_pp_rank_{rank}_mp_rank_{tensor_rank:02d}_optim_states.pt"
        return self._read(name)["optimizer_state_dict"]

    def _read(self, name: str) -> dict[str, Any]:
        """A file of `state/`, mapped into memory and kept."""
        if name not in self._files:
            path = self.path / STATE / name
            try:
                with torch.serialization.safe_globals(DEEPSPEED_TYPES):
                    self._files[name] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except FileNotFoundError:
                raise UserError(f"checkpoint {self.path} lacks {STATE}/{name}") from None
        return self._files[name]
