"""Warns of schedules that a run of the configured length cannot follow, before it costs a run."""

from megatron_taipan.config import Config
from megatron_taipan.gate_config import Schedule
from megatron_taipan.optim_config import OptimConfig
from megatron_taipan.train.schedule import GATE_SCHEDULES, learning_rate, scheduled


def shortfalls(config: Config, step: int, run_steps: int) -> list[str]:
    """A sentence for each shortfall.

    Args:
        step: where the run continues; 0 for a new one.
        run_steps: the steps that fractions of the gate's schedules refer to, see `schedule.scheduled`.
    """
    t = config.train
    found = []
    for name, last in (("train.steps", t.steps), ("train.stop_at", t.stop_at)):
        if last is not None and last < step:
            found.append(f"{name}={last} is before step {step}, where the checkpoint is: nothing is trained")
    if t.stop_at is not None and t.stop_at > t.steps:
        found.append(f"train.stop_at={t.stop_at} is after the last step, train.steps={t.steps}: it has no effect")
    found += _of_the_learning_rate(config.optim, t.steps)
    if config.model.gated_layers:
        for name in GATE_SCHEDULES:
            value = getattr(config.model.gate, name)
            if isinstance(value, Schedule):
                found += _of_a_gate_schedule(f"model.gate.{name}", value, t.steps, run_steps)
    return found


def _of_the_learning_rate(optim: OptimConfig, steps: int) -> list[str]:
    last, warmup, decay = learning_rate(steps - 1, optim, steps), optim.warmup_steps, optim.decay_steps
    if warmup >= steps:
        return [
            f"optim.warmup_steps={warmup} takes all of train.steps={steps}: the learning rate ends at {last:.4g},"
            f" {last / optim.lr:.3g} of its peak, and never decays; lower optim.warmup_steps, for example to"
            f" {steps // 10}"
        ]
    if decay is not None and decay <= warmup:
        return [
            f"optim.decay_steps={decay} is not after optim.warmup_steps={warmup}: after the warm-up the learning rate"
            f" falls from {optim.lr:.4g} to optim.min_lr={optim.min_lr:.4g} at once"
        ]
    room = (decay or steps) - warmup
    if optim.schedule == "wsd" and optim.wsd_decay_steps and optim.wsd_decay_steps > room:
        return [
            f"optim.wsd_decay_steps={optim.wsd_decay_steps} is more than the {room} steps between the warm-up and step"
            f" {decay or steps}: the decay is as short as those, and nothing is stable"
        ]
    if decay is not None and decay > steps:
        return [
            f"optim.decay_steps={decay} is after train.steps={steps}: the learning rate ends at {last:.4g}, not at"
            f" optim.min_lr={optim.min_lr:.4g}"
        ]
    return []


def _of_a_gate_schedule(name: str, value: Schedule, steps: int, run_steps: int) -> list[str]:
    first, last = (value.step_of(place, run_steps) for place in (value.after, value.until))
    if first >= steps:
        return [
            f"{name}: after={value.after:g} is step {first:g}, and the run ends at train.steps={steps}: it stays at"
            f" {value.start:g}"
        ]
    if last > steps:
        reached = scheduled(value, steps - 1, run_steps)
        return [
            f"{name}: until={value.until:g} is step {last:g}, and the run ends at train.steps={steps}: it reaches"
            f" {reached:.4g}, not end={value.end:g}, which evaluation and exports use"
        ]
    return []
