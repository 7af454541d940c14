"""A copy of this rank's part of the training state in host memory: what a checkpoint is written from.

Every element of the state is in one rank's part: a rank holds the shards that its optimizer updates (stage 0: its share
of what all replicas hold), and of parameters that every tensor rank holds only tensor rank 0 keeps a copy.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taipan.checkpoint.randomness import random_states
from megatron_taipan.config import Config
from megatron_taipan.engine.protocol import Engine
from megatron_taipan.engine.state_shards import (
    MASTER,
    buffers,
    held_shards,
    optimizer_step,
    scaler_state,
)
from megatron_taipan.parallel.groups import Groups
from megatron_taipan.parameters import parameter_table


@dataclass(frozen=True)
class Snapshot:
    """What one rank writes."""

    file: str  # name of this rank's file
    tensors: dict[str, Tensor]  # by the name in the file, on the CPU
    index: dict[str, Any]  # this rank's part of state/index.json, see reader.py
    whole: dict[str, Any]  # the part of it that is the same on every rank

    def weights(self) -> "Snapshot":
        """The same without what only a resumed run needs: moments and random states. Memory is shared."""
        kept = {n: t for n, t in self.tensors.items() if n.rpartition("|")[2] in (MASTER, "buffer")}
        return Snapshot(self.file, kept, self.index, self.whole)


class HostMemory:
    """Keeps the memory of the last snapshot for the next one: to get it from the system costs more than the copy."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}

    def copy(self, name: str, source: Tensor) -> Tensor:
        """A contiguous copy on the CPU, valid until the next one of this name; see `settle` for a GPU's."""
        target = self.kept.get(name)
        if target is None or target.shape != source.shape or target.dtype != source.dtype:
            target = self.kept[name] = _empty_like(source)
        return target.copy_(source.detach(), non_blocking=source.is_cuda)

    def settle(self) -> None:
        """Waits for copies from a GPU."""
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()


def _empty_like(source: Tensor) -> Tensor:
    if source.is_cuda:
        try:
            return torch.empty(source.shape, dtype=source.dtype, pin_memory=True)  # copies several times as fast
        except RuntimeError:  # the system grants no more of it
            pass
    return torch.empty(source.shape, dtype=source.dtype)


def take_snapshot(engine: Engine, config: Config, groups: Groups, memory: HostMemory) -> Snapshot:
    """Copies this rank's part of the state; training may go on as soon as it returns."""
    table = parameter_table(config.model, config.parallel.tensor)
    file = f"rank_{dist.get_rank():05d}.safetensors"
    tensors: dict[str, Tensor] = {}
    index: dict[str, Any] = {"parameters": {}, "buffers": {}}
    shards = held_shards(engine, groups.zero_rank)
    whole = {
        "tensor": config.parallel.tensor,
        "processes": dist.get_world_size(),
        "optimizer_step": optimizer_step(shards),
        "scaler": scaler_state(engine),
    }
    if config.parallel.zero_stage == 0:
        shards = [shard.part(groups.zero_rank, groups.zero_size) for shard in shards]
    for shard in shards:
        split = table[shard.name].split is not None
        if shard.replica or not shard.count or (not split and groups.tensor.rank > 0):
            continue
        for kind in shard.kinds:
            tensors[f"{shard.name}|{kind}"] = memory.copy(f"{shard.name}|{kind}", shard.tensor(kind).float())
        tensor_rank = groups.tensor.rank if split else 0
        index["parameters"][shard.name] = [[file, tensor_rank, shard.start, shard.count]]
    if groups.zero_rank == 0 and groups.tensor.rank == 0:
        for name, value in buffers(engine.module):
            tensors[f"{name}|buffer"] = memory.copy(f"{name}|buffer", value)
            index["buffers"][name] = file
    tensors |= {f"{name}|random": value for name, value in random_states().items()}
    memory.settle()
    return Snapshot(file, tensors, index, whole)


def join_indices(shares: list[dict[str, Any]]) -> dict[str, Any]:
    """The index of the whole checkpoint from all ranks' parts."""
    parameters: dict[str, list] = {}
    named_buffers: dict[str, str] = {}
    for share in shares:
        named_buffers |= share["buffers"]
        for name, runs in share["parameters"].items():
            parameters.setdefault(name, []).extend(runs)
    return {"parameters": parameters, "buffers": named_buffers}


def held_state_is_finite(engine: Engine, zero_rank: int) -> bool:
    """Whether all parameters and moments that this rank updates are finite; it waits for the device."""
    extremes: list[Tensor] = []
    for shard in held_shards(engine, zero_rank):
        for kind in shard.kinds:
            extremes += torch.aminmax(shard.tensor(kind))  # one pass without a copy; NaN comes through
    return not extremes or bool(torch.stack([value.float() for value in extremes]).isfinite().all())
