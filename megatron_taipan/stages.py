"""A run in stages: which options hold from which step on. A pure function of the configuration."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from megatron_taipan.section import Section, faults
from megatron_taipan.stage_config import StageConfig

if TYPE_CHECKING:
    from megatron_taipan.config import Config

OPTIM = "optim"  # the name of the learning rate's schedule in `Stage.own`
# Lengths that the learning rate's top-level schedule gives in steps of the run; a stage's own schedule has its own.
OF_THE_RUN: dict[str, Any] = {"warmup_steps": 0, "decay_steps": None, "wsd_decay_steps": None}


@dataclass(frozen=True)
class Stage:
    """Consecutive steps of a run with the same options.

    A schedule that the stage gives itself counts from its first step, and fractions in it are of the stage; one of the
    top level counts over the whole run, whatever stages it crosses.
    """

    number: int  # from 0
    name: str
    first: int  # steps taken when it begins
    last: int  # steps taken when it is done
    config: "Config"  # what holds in it; train.steps stays that of the whole run, and it has no stages
    own: frozenset[str] = frozenset()  # schedules that it gives itself: "optim", and names of StageGate

    @property
    def steps(self) -> int:
        """Its length."""
        return self.last - self.first

    @property
    def tokens_per_step(self) -> int:
        """Of the global batch."""
        return self.config.train.global_batch * self.config.data.seq_len

    def clock(self, schedule: str, run_steps: int) -> tuple[int, int]:
        """The step that a schedule counts from, and the steps that its fractions are of; run_steps: of the run."""
        return (self.first, self.steps) if schedule in self.own else (0, run_steps)

    def title(self) -> str:
        """For logs: `stage 2 (decay)`."""
        return f"stage {self.number + 1}" + (f" ({self.name})" if self.name else "")


def plan_stages(config: "Config") -> list[Stage]:
    """The stages of a run; without `stages` one, whose configuration is the run's.

    Raises:
        ValueError: lengths do not add up, or a stage's options do not fit together.
    """
    if not config.stages:
        return [Stage(0, "", 0, config.train.steps, config)]
    bounds = [0, *accumulate(_lengths(config.stages, config.train.steps))]
    return [
        Stage(number, stage.name or "", first, last, _config_in(config, stage, number), _own(stage))
        for number, (stage, (first, last)) in enumerate(zip(config.stages, pairwise(bounds), strict=True))
    ]


def stage_at(plan: Sequence[Stage], step: int) -> Stage:
    """The stage that took step number `step`, counted from 1; for 0 the first, after the run's end the last."""
    return next((stage for stage in plan if step <= stage.last), plan[-1])


def _lengths(stages: list[StageConfig], run_steps: int) -> list[int]:
    given = [stage.steps for stage in stages]
    for number, steps in enumerate(given[:-1]):
        if steps is None:
            raise ValueError(f"stages.{number} has no length; only the last stage may take what is left of train.steps")
    known = sum(steps or 0 for steps in given)
    if given[-1] is None:
        if known >= run_steps:
            raise ValueError(
                f"the stages before the last take {known} steps, and train.steps={run_steps} leaves none for it"
            )
        return [steps if steps is not None else run_steps - known for steps in given]
    if known != run_steps:
        raise ValueError(
            f"the stages take {known} steps together and train.steps={run_steps}; set train.steps={known} or leave it"
            " out, or leave out the length of the last stage, which then takes what is left"
        )
    return [steps or 0 for steps in given]


def run_length(tree: Any) -> Any:
    """The configuration's tree, lengths in steps but not validated, with train.steps from stages that all have a length
    where it is not given."""
    stages, train = (tree.get(name) for name in ("stages", "train")) if isinstance(tree, dict) else (None, None)
    if not isinstance(stages, list) or not stages or not isinstance(train, dict) or train.get("steps") is not None:
        return tree
    lengths: list[Any] = [stage.get("steps") if isinstance(stage, dict) else None for stage in stages]
    if not all(isinstance(length, int) and not isinstance(length, bool) for length in lengths):
        return tree
    return tree | {"train": train | {"steps": sum(lengths)}}


def _own(stage: StageConfig) -> frozenset[str]:
    schedules = _given(stage.model.gate).keys()
    return frozenset(schedules | ({OPTIM} if _given(stage.optim) else set()))


def _given(options: Section) -> dict[str, Any]:
    """The options of a section of a stage that are not null."""
    return {name: value for name, value in options if value is not None}


def _config_in(config: "Config", stage: StageConfig, number: int) -> "Config":
    optim = _given(stage.optim)
    if optim:  # a run warms up once, in its first stage, unless a later one says so
        of_the_run = OF_THE_RUN | ({"warmup_steps": config.optim.warmup_steps} if number == 0 else {})
        optim = of_the_run | optim
    try:
        gate = _with(config.model.gate, _given(stage.model.gate))
        changed = {
            "data": _with(config.data, _given(stage.data)),
            "optim": _with(config.optim, optim),
            "train": _with(config.train, _given(stage.train)),
            "model": _with(config.model, {"gate": gate} if gate is not config.model.gate else {}),
            "parallel": _with(config.parallel, _given(stage.parallel)),
        }
        return type(config).model_validate(dict(config) | changed | {"stages": []})
    except ValidationError as error:
        raise ValueError(f"stages.{number}: {faults(error)}") from error


def _with(section: Any, changes: dict[str, Any]) -> Any:
    """The section with some options changed, validated; itself where none is."""
    return type(section).model_validate(dict(section) | changes) if changes else section


def describe_stage(stage: Stage) -> str:
    """A stage in one line, for logs."""
    c, tokens = stage.config, stage.steps * stage.tokens_per_step
    return (
        f"{stage.title()}: steps {stage.first + 1:,} to {stage.last:,} = {tokens:,} tokens, in rows of"
        f" {c.data.seq_len}, {c.train.global_batch} a step and {c.train.micro_batch} a micro-batch, recompute"
        f" {c.parallel.recompute}"
    )
