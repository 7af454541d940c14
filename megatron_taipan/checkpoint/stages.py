"""Stages of a run in its checkpoints: which are done and what they read, and that nobody edits those.

`Progress.finished` has a record of each stage that is done:

    name           for people
    fingerprint    of the data that it read
    step           steps taken at its end, and so samples, tokens
    read           how often each source had been read by then, as a fraction, by the fingerprint of its data
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from megatron_taipan.checkpoint.folder import find_newest, is_checkpoint
from megatron_taipan.checkpoint.metadata import Progress, dotted_settings, read_metadata
from megatron_taipan.config import Config
from megatron_taipan.config_text import yaml_text
from megatron_taipan.data.loader import SampleDataset
from megatron_taipan.errors import UserError
from megatron_taipan.stages import Stage, plan_stages


def finish_stage(progress: Progress, stage: Stage, data: SampleDataset) -> Progress:
    """The progress with which the next stage begins. A new level of the loss is no spike, so its window is empty."""
    read = {name: str(times) for name, times in (places(progress) | data.read_after(progress.samples)).items()}
    record = {
        "name": stage.name, "fingerprint": data.fingerprint, "step": progress.step, "samples": progress.samples,
        "tokens": progress.tokens, "read": read,
    }  # fmt: skip
    return replace(progress, finished=[*progress.finished, record], recent=[])


def places(progress: Progress) -> dict[str, Fraction]:
    """How often each source had been read when the present stage began, by the fingerprint of its data."""
    read = progress.finished[-1]["read"] if progress.finished else {}
    return {name: Fraction(times) for name, times in read.items()}


def go_on_in_stage(data: SampleDataset, progress: Progress) -> None:
    """Lets a dataset begin where the stage did: at its first sample of the run, each source at its place."""
    if progress.finished:
        data.go_on(progress.finished[-1]["samples"], places(progress))


def stages_done(config: Config) -> int:
    """How many stages are done in the checkpoint that the run is likely to continue from; 0 where none can be read.

    Their data need not be there any more.
    """
    if config.stages and (path := likely_checkpoint(config)):
        with suppress(UserError):  # damaged: another one will be taken
            return min(len(read_metadata(path)["progress"].get("finished", [])), len(config.stages) - 1)
    return 0


def likely_checkpoint(config: Config) -> Path | None:
    """The checkpoint that the run is likely to continue from; which one it is shows once they are verified."""
    wanted = config.checkpoint.load
    folders = [] if wanted is None else [config.checkpoint.dir] if wanted == "auto" else [config.checkpoint.dir, wanted]
    for folder in map(Path, folders):
        if is_checkpoint(folder):
            return folder
        if found := find_newest(folder):
            return found.path
    return None


def stage_under_way(plan: Sequence[Stage], finished: int, step: int, path: str) -> Stage:
    """The stage in which a checkpoint of step `step` was written.

    Raises:
        UserError: the run has fewer stages than are done, or a stage ends before the step where it is.
    """
    if finished >= len(plan):
        raise UserError(
            f"{finished} stages are done in checkpoint {path}, and stages has {len(plan)}; leave those that are done as"
            " they were, and give the ones that follow"
        )
    stage = plan[finished]
    if step > stage.last and len(plan) > finished + 1:
        raise UserError(
            f"{stage.title()} ends at step {stage.last}, and checkpoint {path} is in it at step {step}; let it end at"
            f" step {step} (stages.{stage.number}.steps={step - stage.first}) or later"
        )
    return stage


def refuse_edited_stages(path: str, saved: Config, ours: Config, step: int) -> None:
    """Raises UserError, naming all differences, if a stage that is done by `step` is not as it was."""
    if not saved.stages:
        return
    found = []
    for stage in plan_stages(saved):
        if stage.last > step:
            break
        k = stage.number
        before, now = (
            dotted_settings(c.stages[k].model_dump(mode="json")) if k < len(c.stages) else {} for c in (saved, ours)
        )
        if k == len(saved.stages) - 1:  # a run that is prolonged: its last stage takes what is left
            before.pop("steps", None), now.pop("steps", None)
        names = [*before, *(name for name in now if name not in before)]
        found += (
            [
                f"stages.{k}.{name}: checkpoint has {yaml_text(before.get(name))}, this run {yaml_text(now.get(name))}"
                for name in names
                if before.get(name) != now.get(name)
            ]
            if now
            else [f"stages.{k}: checkpoint has it, this run nothing"]
        )
    if found:
        raise UserError(
            f"checkpoint {path} is at step {step}, and stages that are done by then cannot be edited:"
            f" {'; '.join(found)}. Leave them as they were; stages that follow may be edited"
        )
