"""What the gates use in one pass: the current values of their schedules, and what the step before measured."""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_taipan.gate_config import GateConfig, at_the_end


class GateSettings(NamedTuple):
    """The same for every gate of the network. From a trainer they are float32 on the device, so that recorded CUDA
    graphs see each step's own (a tuple for ZeRO-3's sake)."""

    capacity: Tensor | float  # C
    tau: Tensor | float
    budget_lambda: Tensor | float
    every_query: Tensor | bool  # with gradient=sampled: whether this step computes every query
    shares: Tensor | None = None  # [S layers] share that each gate selected over the whole step before: budget=batch
    vector: Tensor | None = None  # what it was unpacked from

    @staticmethod
    def unpack(vector: Tensor) -> "GateSettings":
        """From float32 [4 + S layers]: capacity, tau, lambda, every_query, shares; see train/schedule.py."""
        capacity, tau, budget_lambda, every = vector[:4].unbind()
        return GateSettings(capacity, tau, budget_lambda, every > 0.5, vector[4:], vector)

    def to(self, device: torch.device) -> "GateSettings":
        """The same on another device; plain numbers stay what they are."""
        numbers: Any = (n.to(device) if isinstance(n, Tensor) else n for n in self)
        return GateSettings(*numbers)

    def pack(self, gates: int, device: torch.device) -> Tensor:
        """The vector; where no trainer gave one and the shares are not known, C is used for each of them."""
        if self.vector is not None:
            return self.vector
        numbers = [self.capacity, self.tau, self.budget_lambda, self.every_query, *[self.capacity] * gates]
        return torch.stack([n.float() if isinstance(n, Tensor) else torch.full((), n, device=device) for n in numbers])


def settings_of(gate: GateConfig, vector: Tensor | None, step: int | Tensor = 0) -> GateSettings:
    """What a trainer gave, float32 [4 + S layers], or where it gave nothing the schedules' last values."""
    return settled(gate, step) if vector is None else GateSettings.unpack(vector)


def settled(gate: GateConfig, step: int | Tensor = 0) -> GateSettings:
    """Where no trainer gives any: the schedules' last values; the current batch is used in place of the step's."""
    capacity, tau, budget_lambda = (at_the_end(v) for v in (gate.capacity, gate.tau, gate.budget_lambda))
    return GateSettings(capacity, tau, budget_lambda, computes_every_query(gate, step))


def computes_every_query(gate: GateConfig, step: int | Tensor) -> bool | Tensor:
    """Whether a step computes the queries of unselected tokens too; sampled: evenly spread, by the step alone, with the
    last value of the share (train/schedule.py has a trainer's steps)."""
    if gate.gradient != "sampled":
        return gate.gradient == "all"
    share = at_the_end(gate.gradient_share)
    if isinstance(step, Tensor):
        return torch.floor((step + 1).double() * share) > torch.floor(step.double() * share)
    return math.floor((step + 1) * share) > math.floor(step * share)
