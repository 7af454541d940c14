"""Loss spikes: a step whose loss is far above those before it, and the rewind to a checkpoint before it happened.

What a run remembers for this (the last losses, the rewinds so far) is part of its progress, so it is in every
checkpoint, and a resumed run judges and rewinds as the uninterrupted one would have done.
"""

from dataclasses import replace
from typing import Any

from megatron_taipan.checkpoint.metadata import Progress
from megatron_taipan.errors import UserError
from megatron_taipan.train.step import StepResult
from megatron_taipan.train_config import TrainConfig

SMALLEST_DEVIATION = 1e-6  # nats; a window of equal losses must not make a spike of rounding


def z_score(recent: list[float], result: StepResult, train: TrainConfig) -> float | None:
    """How many standard deviations a step's cross entropy is above the window's mean, if that is a spike.

    None where `train.spike_z` is null, while the window is not full, for a skipped step, and below `train.spike_z`.
    """
    if train.spike_z is None or result.skipped or len(recent) < train.spike_window:
        return None
    mean = sum(recent) / len(recent)
    deviation = (sum((value - mean) ** 2 for value in recent) / len(recent)) ** 0.5
    z = (result.ce - mean) / max(deviation, SMALLEST_DEVIATION)
    return z if z > train.spike_z else None


def remember(recent: list[float], result: StepResult, train: TrainConfig) -> list[float]:
    """The window with this step's loss in it; a spike too, so that a new level of the loss becomes the usual one."""
    if train.spike_z is None or result.skipped:
        return recent
    return [*recent, result.ce][-train.spike_window :]


def after_rewind(saved: Progress, now: Progress, *, z: float, train: TrainConfig) -> Progress:
    """The progress with which to continue from an older checkpoint, past all samples that were drawn since.

    Args:
        saved: of the checkpoint; its step, tokens and window are what the weights have seen.
        now: after the step that spiked.

    Raises:
        UserError: the run has gone back train.spike_max_rewinds times.
    """
    if len(now.rewinds) >= train.spike_max_rewinds:
        raise UserError(
            f"the loss spiked at step {now.step} (z = {z:.1f}) after {len(now.rewinds)} rewinds"
            f" (train.spike_max_rewinds): the data is not to blame. The checkpoint of step {saved.step} is the last"
            " good one; lower optim.lr, or raise train.spike_z"
        )
    record: dict[str, Any] = {
        "from_step": now.step, "to_step": saved.step, "z": z, "first_sample": saved.samples, "past_sample": now.samples,
    }  # fmt: skip
    # run_steps: a checkpoint from before schedules does not know it
    return replace(saved, samples=now.samples, run_steps=now.run_steps, rewinds=[*now.rewinds, record])
