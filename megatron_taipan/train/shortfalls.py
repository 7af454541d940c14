"""Warns of schedules that a run of the configured length cannot follow, before it costs a run."""

from megatron_taipan.config import Config
from megatron_taipan.gate_config import Schedule
from megatron_taipan.optim_config import OptimConfig
from megatron_taipan.stages import OPTIM, plan_stages
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
    plan, said = plan_stages(config), []
    for stage in plan:  # a schedule of the run is looked at once, in the first stage that follows it
        own, optim, gate = f"{stage.title()}: ", stage.config.optim, stage.config.model.gate
        _, steps = stage.clock(OPTIM, t.steps)
        if OPTIM in stage.own:
            found += [own + text for text in _of_the_learning_rate(optim, steps, f"its steps={steps}")]
        elif OPTIM not in said:
            found += _of_the_learning_rate(optim, steps)
            said.append(OPTIM)
        for name in GATE_SCHEDULES if config.model.gated_layers else ():
            if not isinstance(value := getattr(gate, name), Schedule):
                continue
            if name in stage.own:
                path, end = f"{own}model.gate.{name}", f"the stage ends after {stage.steps} steps"
                found += _of_a_gate_schedule(path, value, stage.steps, stage.steps, end)
            elif name not in said:
                found += _of_a_gate_schedule(f"model.gate.{name}", value, t.steps, run_steps)
                said.append(name)
    return found


def _of_the_learning_rate(optim: OptimConfig, steps: int, all_steps: str = "") -> list[str]:
    """all_steps: how `steps` is called; "": train.steps."""
    all_steps = all_steps or f"train.steps={steps}"
    last, warmup, decay = learning_rate(steps - 1, optim, steps), optim.warmup_steps, optim.decay_steps
    if warmup >= steps:
        return [
            f"optim.warmup_steps={warmup} takes all of {all_steps}: the learning rate ends at {last:.4g},"
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
            f"optim.decay_steps={decay} is after {all_steps}: the learning rate ends at {last:.4g}, not at"
            f" optim.min_lr={optim.min_lr:.4g}"
        ]
    return []


def _of_a_gate_schedule(name: str, value: Schedule, steps: int, run_steps: int, end: str = "") -> list[str]:
    """end: says that it ends after `steps`; "": as of a run."""
    end = end or f"the run ends at train.steps={steps}"
    first, last = (value.step_of(place, run_steps) for place in (value.after, value.until))
    if first >= steps:
        return [f"{name}: after={value.after:g} is step {first:g}, and {end}: it stays at {value.start:g}"]
    if last > steps:
        reached = scheduled(value, steps - 1, run_steps)
        return [
            f"{name}: until={value.until:g} is step {last:g}, and {end}: it reaches"
            f" {reached:.4g}, not end={value.end:g}, which evaluation and exports use"
        ]
    return []
