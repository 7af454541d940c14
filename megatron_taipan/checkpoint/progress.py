"""How far a run has come; it stands in every checkpoint."""

from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field

Count = Annotated[int, Field(ge=0)]


@dataclass
class Progress:
    """How far a run has come: the learning rate, the order of samples and the gate's noise are pure functions of these
    counters and of seeds."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")  # for who reads it from a file

    step: Count = 0  # optimizer steps taken, skipped ones included
    samples: Count = 0  # samples consumed: the loader's place
    tokens: Count = 0  # tokens consumed, masked ones included
    skipped: Count = 0  # steps skipped because of a non-finite loss or gradient
    recent: list[float] = field(default_factory=list)  # the last losses, where spikes are looked for (train/spikes.py)
    run_steps: Count = 0  # train.steps when the run began: what the fractions in schedules are of
    shares: list[float] = field(default_factory=list)  # selected by each gate in the last step, for budget=batch
    rewinds: list[dict[str, Any]] = field(default_factory=list)  # each: from which step to which, samples passed over
