"""Schedules as small plots of text, for `--dry-run`: one line each."""

from megatron_taipan.gate_config import Schedule
from megatron_taipan.stages import Stage
from megatron_taipan.train.schedule import GATE_SCHEDULES, rate_in_stage, scheduled_in_stage

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 48  # characters


def schedule_plots(stage: Stage, run_steps: int) -> list[str]:
    """A line for the learning rate and for each schedule of the gate: its course over the stage, with its ends.

    Args:
        run_steps: the steps that fractions of the gate's schedules refer to, see `schedule.scheduled`.
    """
    steps, model = stage.steps, stage.config.model
    at = [round(i * (steps - 1) / (WIDTH - 1)) for i in range(WIDTH)] if steps >= WIDTH else list(range(steps))
    at = [stage.first + step for step in at]
    courses = {"optim.lr": [rate_in_stage(step, stage) for step in at]}
    for name in GATE_SCHEDULES if model.gated_layers else ():
        if isinstance(getattr(model.gate, name), Schedule):
            courses[f"model.gate.{name}"] = [scheduled_in_stage(name, step, stage, run_steps) for step in at]
    return [f"{name} {plot(values)}" for name, values in courses.items()]


def plot(values: list[float]) -> str:
    """Bars from 0 (or a lower value) to the highest value, then what it begins with, reaches and ends at."""
    low, high = min(0.0, *values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    bars = "".join(BARS[round((value - low) * scale)] for value in values)
    highest = f", at most {high:.4g}" if high > max(values[0], values[-1]) else ""
    return f"{bars} from {values[0]:.4g} to {values[-1]:.4g}{highest}"
