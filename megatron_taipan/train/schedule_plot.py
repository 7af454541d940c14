"""Schedules as small plots of text, for `--dry-run`: one line each."""

from megatron_taipan.config import Config
from megatron_taipan.gate_config import Schedule
from megatron_taipan.train.schedule import GATE_SCHEDULES, learning_rate, scheduled

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 48  # characters


def schedule_plots(config: Config, run_steps: int) -> list[str]:
    """A line for the learning rate and for each schedule of the gate: its course over the run, with its ends.

    Args:
        run_steps: the steps that fractions of the gate's schedules refer to, see `schedule.scheduled`.
    """
    steps, gate = config.train.steps, config.model.gate
    at = [round(i * (steps - 1) / (WIDTH - 1)) for i in range(WIDTH)] if steps >= WIDTH else list(range(steps))
    courses = {"optim.lr": [learning_rate(step, config.optim, steps) for step in at]}
    for name in GATE_SCHEDULES if config.model.gated_layers else ():
        value = getattr(gate, name)
        if isinstance(value, Schedule):
            courses[f"model.gate.{name}"] = [scheduled(value, step, run_steps) for step in at]
    return [f"{name} {plot(values)}" for name, values in courses.items()]


def plot(values: list[float]) -> str:
    """Bars from 0 (or a lower value) to the highest value, then what it begins with, reaches and ends at."""
    low, high = min(0.0, *values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    bars = "".join(BARS[round((value - low) * scale)] for value in values)
    highest = f", at most {high:.4g}" if high > max(values[0], values[-1]) else ""
    return f"{bars} from {values[0]:.4g} to {values[-1]:.4g}{highest}"
