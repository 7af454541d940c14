"""What this process holds of the training state: a shard of each parameter's float32 master and Adam moments.

ZeRO partitions the state in its own ways: stages 1 and 2 lay all parameters of a group end to end and cut that once per
data-parallel rank, stage 3 cuts each parameter. Both come down to the same thing, one run of elements of a flattened
parameter on a rank, and as that they are saved and loaded; so a checkpoint knows nothing of stages.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_taipan.engine.protocol import Engine
from megatron_taipan.optim_config import OptimConfig
from megatron_taipan.param_spec import ParamSpec

MASTER, MOMENTS = "master", ("exp_avg", "exp_avg_sq")
KINDS = (MASTER, *MOMENTS)
OF_MUON = (MASTER, "exp_avg")  # of the matrices that it steps
EMA = "ema"  # the average of the weights, where one is kept (ema.py)


@dataclass(frozen=True)
class StateShard:
    """Elements `start` to `start + count` of a flattened parameter (of this tensor rank's shard of it)."""

    name: str
    start: int
    count: int
    flat: Tensor  # float32: the tensor that the optimizer steps, of which the shard is a part
    offset: int  # of the shard in `flat`, flattened
    optimizer: torch.optim.Optimizer
    replica: bool  # a tied parameter's copy on a later pipeline stage, which another stage saves

    def tensor(self, kind: str) -> Tensor:
        """A view [count] of the master, a moment or the average."""
        whole = self.flat if kind == MASTER else self.optimizer.state[self.flat][kind]
        return whole.detach().view(-1).narrow(0, self.offset, self.count)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What is kept of it."""
        return (MASTER, *(kind for kind in (*MOMENTS, EMA) if kind in self.optimizer.state[self.flat]))

    def part(self, number: int, parts: int) -> "StateShard":
        """The shard's share `number` when it is cut in `parts`, nearly equal ones."""
        first, last = self.count * number // parts, self.count * (number + 1) // parts
        return replace(self, start=self.start + first, count=last - first, offset=self.offset + first)


def held_shards(engine: Engine, zero_rank: int) -> list[StateShard]:
    """All that this rank's optimizer updates, empty shards left out.

    Args:
        zero_rank: this rank's number among those that share the state (`Groups.zero_rank`).
    """
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    base = engine.basic_optimizer
    shards = []
    parameters: Iterable[tuple[str, Any]] = engine.module.named_parameters()  # DeepSpeed sets attributes on each
    for name, parameter in parameters:
        replica = bool(getattr(parameter, "ds_pipe_replicated", False))
        if stage == 0:
            shard = StateShard(name, 0, parameter.numel(), parameter, 0, base, replica)
        elif stage == 3:
            group, offset, width = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = width * zero_rank
            count = min(max(parameter.ds_numel - start, 0), width)
            shard = StateShard(name, start, count, optimizer.fp32_partitioned_groups_flat[group], offset, base, replica)
        else:
            mapping = parameter._hp_mapping
            if mapping is None:  # another data-parallel rank's
                continue
            flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            shard = StateShard(name, here.start, here.numel, flat, there.start, base, replica)
        if shard.count:
            shards.append(shard)
    fill_in_moments(shards)
    return shards


def kinds_of(spec: ParamSpec, optim: OptimConfig) -> tuple[str, ...]:
    """What the training state has of a parameter, but for an average."""
    return OF_MUON if optim.name == "muon" and spec.is_matrix else KINDS


def fill_in_moments(shards: list[StateShard]) -> None:
    """Gives every stepped tensor the state that Adam or Muon has; before a first step there is nothing to view."""
    muon = {
        id(p) for s in shards[:1] for group in s.optimizer.param_groups if group.get("muon") for p in group["params"]
    }
    for shard in shards:
        state = shard.optimizer.state[shard.flat]
        if not state:
            # a float32 counter beside the parameters is what the fused implementation keeps
            state["step"] = torch.zeros((), dtype=torch.float32, device=shard.flat.device)
            for kind in OF_MUON[1:] if id(shard.flat) in muon else MOMENTS:
                state[kind] = torch.zeros_like(shard.flat, memory_format=torch.preserve_format).detach()


def optimizer_step(shards: list[StateShard]) -> int:
    """Number of updates by Adam; the same for every parameter."""
    steps = {int(shard.optimizer.state[shard.flat]["step"]) for shard in shards}
    if len(steps) > 1:
        raise RuntimeError(f"parameters of one optimizer have made different numbers of steps: {sorted(steps)}")
    return steps.pop() if steps else 0


def set_optimizer_step(shards: list[StateShard], step: int) -> None:
    for shard in shards:
        shard.optimizer.state[shard.flat]["step"].fill_(step)


def spread_masters(engine: Engine) -> None:
    """Brings the parameters of the forward pass up to date with masters that were just loaded; collective."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer.update_lp_params()
    elif stage == 3:
        optimizer.checkpoint_event_prologue()  # hand back the few parameters that are kept whole
        for low, master in zip(
            optimizer.fp16_partitioned_groups_flat, optimizer.fp32_partitioned_groups_flat, strict=True
        ):
            low.data.copy_(master.data)
        optimizer.checkpoint_event_epilogue()  # and gather them again


def scaler_state(engine: Engine) -> dict[str, float] | None:
    """The dynamic loss scaler of fp16; None without one."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is None or not getattr(scaler, "dynamic", False):
        return None
    return {name: getattr(scaler, name) for name in SCALER_FIELDS}


SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def set_scaler_state(engine: Engine, state: dict[str, float] | None) -> None:
    """Restores what `scaler_state` gave; a run that has no scaler, or had none, starts its own way."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if state is not None and scaler is not None and getattr(scaler, "dynamic", False):
        for name in SCALER_FIELDS:
            setattr(scaler, name, state[name])


def buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers, such as calibrated thresholds, by name in the whole network."""
    yield from model.named_buffers()
