"""Values that change over training, each a pure function of the step: a resumed run needs no scheduler state."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_taipan.config import Config
from megatron_taipan.errors import UserError
from megatron_taipan.gate_config import GateConfig, Schedule
from megatron_taipan.model.gate_settings import computes_every_query
from megatron_taipan.optim_config import OptimConfig
from megatron_taipan.stages import OPTIM, Stage, plan_stages, stage_at

GATE_SCHEDULES = ("capacity", "tau", "budget_lambda", "gradient_share")


# Shapes of a decay: the part of the way down that is left, from 1 to 0, where the fraction p of its steps is gone.
DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda p: 1 - p,
    "cosine": lambda p: 0.5 * (1 + math.cos(math.pi * p)),
    "1-sqrt": lambda p: 1 - math.sqrt(p),  # arXiv 2405.18392, equation 3
}


def learning_rate(step: int, optim: OptimConfig, total_steps: int) -> float:
    """The learning rate of one optimizer step: linear warm-up, then down to min_lr by `optim.schedule`.

    wsd (warm-up, stable, decay; arXiv 2404.06395) stays at the peak until its decay begins.

    Args:
        step: steps already taken, so the first step is 0 and gets 1/warmup_steps of the peak.
        total_steps: where min_lr is reached if `optim.decay_steps` is null.
    """
    taken = step + 1
    if taken <= optim.warmup_steps:
        return optim.lr * taken / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    first, last = decay_span(optim, total_steps)
    if taken >= last:
        return optim.min_lr
    if taken <= first:
        return optim.lr
    shape = optim.wsd_decay if optim.schedule == "wsd" else optim.schedule
    return optim.min_lr + (optim.lr - optim.min_lr) * DECAYS[shape]((taken - first) / (last - first))


def decay_span(optim: OptimConfig, total_steps: int) -> tuple[int, int]:
    """Steps taken when the decay begins and when min_lr is reached, as for `learning_rate`; not for a constant one."""
    last = optim.decay_steps or total_steps
    if optim.schedule != "wsd":
        return optim.warmup_steps, last
    length = optim.wsd_decay_steps or max(1, last // 5)
    return max(optim.warmup_steps, last - length), last


def rate_in_stage(step: int, stage: Stage) -> float:
    """The learning rate of one optimizer step of a stage: by its own schedule, or by the run's."""
    first, steps = stage.clock(OPTIM, stage.config.train.steps)
    return learning_rate(step - first, stage.config.optim, steps)


def scheduled_in_stage(name: str, step: int, stage: Stage, run_steps: int) -> float:
    """The value of one of GATE_SCHEDULES at an optimizer step of a stage; step and run_steps as for `scheduled`."""
    first, steps = stage.clock(name, run_steps)
    return scheduled(getattr(stage.config.model.gate, name), step - first, steps)


def scheduled(value: float | Schedule, step: int, run_steps: int) -> float:
    """The value of a constant or a schedule at one optimizer step.

    Args:
        step: steps already taken, so the first step is 0.
        run_steps: the steps that the schedule's fractions refer to: train.steps as it was when the run began.
    """
    if not isinstance(value, Schedule):
        return value
    first, last = (value.step_of(place, run_steps) for place in (value.after, value.until))
    if step <= first or step >= last:
        return value.start if step < last else value.end
    gone = (step - first) / (last - first)
    if value.shape == "cosine":
        gone = 0.5 * (1 - math.cos(math.pi * gone))
    return value.start + (value.end - value.start) * gone


def scheduled_sum(value: float | Schedule, step: int, run_steps: int) -> float:
    """The integral of `scheduled` from step 0 to `step`, in closed form: how many steps a share has taken by then."""
    if not isinstance(value, Schedule):
        return step * value
    first, last = (value.step_of(place, run_steps) for place in (value.after, value.until))
    first = min(first, last)  # one that ends before it begins jumps at its end
    gone = min(step, last) - first
    whole = value.start * min(step, first) + value.end * max(0.0, step - last)
    if gone <= 0:
        return whole
    length = last - first
    risen = gone**2 / (2 * length)
    if value.shape == "cosine":
        risen = gone / 2 - length / (2 * math.pi) * math.sin(math.pi * gone / length)
    return whole + value.start * gone + (value.end - value.start) * risen


def every_query_at(gate: GateConfig, step: int, run_steps: int, stage: Stage | None = None) -> bool:
    """Whether an optimizer step computes the queries of unselected tokens; arguments as for `gate_step`.

    With a share that changes these are the steps in which its sum passes a whole number: spread as evenly as those of a
    constant one, and a function of the step alone.
    """
    share = gate.gradient_share
    if gate.gradient != "sampled" or not isinstance(share, Schedule):
        return bool(computes_every_query(gate, step))
    first, steps = _clock("gradient_share", run_steps, stage)
    before, after = (scheduled_sum(share, taken - first, steps) for taken in (step, step + 1))
    return math.floor(after) > math.floor(before)


@dataclass(frozen=True)
class GateStep:
    """The gates' settings for one optimizer step; the same on every rank."""

    capacity: float
    tau: float
    budget_lambda: float
    every_query: bool
    shares: list[float]  # share that each gate selected in the step before; C where there was none
    budget: str  # see GateConfig.budget

    def vector(self) -> list[float]:
        """The settings in the order of GateSettings.unpack."""
        return [self.capacity, self.tau, self.budget_lambda, float(self.every_query), *self.shares]


def gate_step(
    gate: GateConfig, step: int, run_steps: int, shares: list[float], gates: int, stage: Stage | None = None
) -> GateStep:
    """The gates' settings of one optimizer step.

    Args:
        step, run_steps: as for `scheduled`.
        shares: measured in the step before; empty before the first.
        gates: number of S layers.
        stage: that the step is in; its own schedules count from its first step.
    """
    told = ("capacity", "tau", "budget_lambda")
    clocks = {name: _clock(name, run_steps, stage) for name in told}
    capacity, tau, weight = (
        scheduled(getattr(gate, name), step - first, steps) for name, (first, steps) in clocks.items()
    )
    every = every_query_at(gate, step, run_steps, stage)
    return GateStep(capacity, tau, weight, every, shares or [capacity] * gates, gate.budget)


def describe_gate(gate: GateConfig, run_steps: int, stage: Stage | None = None) -> str:
    """The schedules with their steps, for the log; empty where all is constant. stage: as for `gate_step`.

    Raises:
        UserError: a schedule ends before it begins, one given as a step, the other as a fraction of the run.
    """
    parts = []
    for name in GATE_SCHEDULES:
        value = getattr(gate, name)
        if isinstance(value, Schedule):
            begin, steps = _clock(name, run_steps, stage)
            first, last = (begin + value.step_of(place, steps) for place in (value.after, value.until))
            if last < first:
                raise UserError(
                    f"model.gate.{name}: until={value.until:g} is step {last:g} of a run of {run_steps} steps, before"
                    f" after={value.after:g}, step {first:g}; give both as steps or both as fractions of the run"
                )
            parts.append(
                f"{name} {value.start:g} until step {first:.0f}, {value.shape} to {value.end:g} at step {last:.0f}"
            )
    return ", ".join(parts)


def _clock(name: str, run_steps: int, stage: Stage | None) -> tuple[int, int]:
    """The step from which a gate's schedule counts, and the steps that its fractions refer to; None: of a whole run."""
    return stage.clock(name, run_steps) if stage else (0, run_steps)


def jumps(before: Config, now: Config, step: int, run_steps: int) -> list[str]:
    """Values that differ at this step between two configurations' schedules, as `name from X to Y`.

    Args:
        before: the checkpoint's configuration; now: of the run that resumes it.
        step, run_steps: as for `scheduled`, where the run continues.
    """
    values = [
        {
            "the learning rate": rate_in_stage(step, stage),
            **{f"model.gate.{n}": scheduled_in_stage(n, step, stage, run_steps) for n in GATE_SCHEDULES},
        }
        for stage in (stage_at(plan_stages(config), step + 1) for config in (before, now))
    ]
    pairs = [(name, value, values[1][name]) for name, value in values[0].items()]
    return [
        f"{name} from {old:.4g} to {new:.4g}" + (f", {new / old:.3g} times as high" if old else "")
        for name, old, new in pairs
        if not math.isclose(old, new, rel_tol=1e-3)
    ]
