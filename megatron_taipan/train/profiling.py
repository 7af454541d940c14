"""`train.profile`: a few steps of a run as a trace, and the GPU memory after them as a snapshot.

    checkpoint.dir/profile/steps_00000003-00000005_rank0.trace.json.gz    chrome://tracing or ui.perfetto.dev
    checkpoint.dir/profile/steps_00000003-00000005_rank0.memory.pickle    pytorch.org/memory_viz (GPU only)

The trace holds every operator and kernel of these steps, each step under its name, and of what else happened between
them (a validation, a checkpoint). Profiled steps are slower; the others are not affected.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from megatron_taipan.train_config import ProfileConfig

HISTORY = 1_000_000  # allocations and frees that the snapshot can hold: dozens of steps of a large model


class StepProfiler:
    """Profiles the steps that `train.profile` names, on the ranks that it names; elsewhere every method does nothing.

    Args:
        wanted: the option; None: never.
        directory: where `profile/` is made.
        say: takes a sentence for the log.
    """

    def __init__(
        self,
        wanted: ProfileConfig | None,
        directory: Path,
        *,
        rank: int,
        device: torch.device,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.wanted = wanted if wanted is not None and rank in wanted.ranks else None
        self.folder, self.rank, self.device, self.say = directory / "profile", rank, device, say
        self.trace: Any = None  # while a trace is being taken
        self.mark: Any = None  # the name of the running step
        self.first = self.last = 0  # steps in the trace
        self.memory = False  # whether the device's memory is recorded beside it

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *_: object) -> None:
        """A run that ends within the steps writes what it has."""
        if self.trace is not None:
            self._finish()

    def begin(self, step: int) -> None:
        """Step `step` (from 1, as in the log) begins."""
        if self.wanted is None or not self.wanted.start <= step <= self.wanted.stop:
            return
        if self.trace is None:
            self._start(step, self.wanted)
        self.last = step
        self.mark = record_function(f"step {step}")
        self.mark.__enter__()

    def end(self, step: int) -> None:
        """Step `step` is done."""
        if self.trace is None or self.mark is None:
            return
        self.mark.__exit__(None, None, None)
        self.mark = None
        if self.wanted is not None and step == self.wanted.stop:
            self._finish()

    def _start(self, step: int, wanted: ProfileConfig) -> None:
        self.first = step
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            self.memory = wanted.memory
            if self.memory:
                torch.cuda.memory._record_memory_history(max_entries=HISTORY)
        self.trace = profile(
            activities=activities, record_shapes=wanted.shapes, with_stack=wanted.stacks, acc_events=True
        )
        self.trace.__enter__()

    def _finish(self) -> None:
        """Writes both files, under temporary names first; a full disk does not end the run."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the last kernels belong to the trace
        if self.mark is not None:
            self.mark.__exit__(None, None, None)
        trace, self.trace, self.mark = self.trace, None, None
        trace.__exit__(None, None, None)
        name = f"steps_{self.first:08d}-{self.last:08d}_rank{self.rank}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # the writer chooses the format by the suffix, so the temporary name keeps it
            self._write(f"{name}.trace.json.gz", trace.export_chrome_trace)
            if self.memory:
                self._write(f"{name}.memory.pickle", torch.cuda.memory._dump_snapshot)
            self.say(f"profile of steps {self.first} to {self.last} in {self.folder}")
        except OSError as error:
            self.say(f"the profile was not written: {error}")
        finally:
            if self.memory:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, name: str, export: Callable[[str], Any]) -> None:
        part = self.folder / f"part.{name}"
        export(str(part))
        os.replace(part, self.folder / name)
