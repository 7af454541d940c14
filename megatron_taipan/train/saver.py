"""Saving during training: at most one state is being written at a time, and a failed save does not end the run."""

import time
from pathlib import Path
from typing import Any

from megatron_taipan.checkpoint.folder import FULL, WEIGHTS, remove_old
from megatron_taipan.checkpoint.metadata import Progress
from megatron_taipan.checkpoint.saving import SaveFailed, Saving
from megatron_taipan.checkpoint.snapshot import HostMemory, held_state_is_finite, take_snapshot
from megatron_taipan.checkpoint.verification import where_to_go_on
from megatron_taipan.config import Config
from megatron_taipan.engine.protocol import Engine
from megatron_taipan.errors import UserError
from megatron_taipan.parallel.groups import Groups
from megatron_taipan.train.distributed import any_rank
from megatron_taipan.train.metrics import Metrics
from megatron_taipan.train.tasks import Tasks


class Saver:
    """Writes checkpoints of a run and keeps the wanted ones.

    Every method is collective, except `writing`, `overdue` and `remove_old`, which are about this rank.

    Args:
        tasks: what reads checkpoints beside the training, on rank 0 of a run that has any.
    """

    def __init__(
        self, engine: Engine, config: Config, metadata: dict[str, Any], groups: Groups, metrics: Metrics,
        tasks: Tasks | None = None,
    ):  # fmt: skip
        self.engine, self.config, self.metadata, self.groups, self.metrics = engine, config, metadata, groups, metrics
        self.tasks = tasks
        self.directory = Path(config.checkpoint.dir)
        self.memory = HostMemory()
        self.pending: list[Saving] = []  # of one snapshot
        self.stall = 0.0  # seconds that training has paused for it, not yet recorded
        self.last = time.monotonic()
        self.failed = False  # whether the newest save failed; it is then tried again before the next one is due

    def writing(self) -> bool:
        """Whether this rank is still writing; when no rank is, `finish` completes the checkpoint without waiting."""
        return any(saving.writing() for saving in self.pending)

    def overdue(self) -> bool:
        """Whether checkpoint.save_minutes have passed, or after a failed save checkpoint.retry_s."""
        c, waited = self.config.checkpoint, time.monotonic() - self.last
        return (c.save_minutes is not None and waited > 60 * c.save_minutes) or (self.failed and waited > c.retry_s)

    def save_due(self, progress: Progress, *, asked: bool) -> None:
        """Starts the saves that are due after this step; `asked`: a full save in any case."""
        every, weights_every = self.config.checkpoint.save_every, self.config.checkpoint.save_weights_every
        kinds = [FULL] if asked or (every and progress.step % every == 0) else []
        kinds += [WEIGHTS] if weights_every and progress.step % weights_every == 0 else []
        if kinds:
            self._start(progress, kinds)
            if not self.config.checkpoint.asynchronous:
                self.finish()

    def save_last(self, progress: Progress) -> None:
        """Saves and waits; a run that ends must not lose its work silently.

        Raises:
            SaveFailed: it could not be written.
        """
        weights_every = self.config.checkpoint.save_weights_every
        kinds = [FULL] + ([WEIGHTS] if weights_every and progress.step % weights_every == 0 else [])
        self._start(progress, kinds, must=True)
        self.finish(must=True)

    def finish(self, *, must: bool = False) -> None:
        """Completes what is pending, waiting for it if need be; with `must` a failure is raised, not only logged."""
        pending, self.pending = self.pending, []
        failures = []
        complete: dict[int, Path] = {}  # by step; of a full and a weights-only save the full one, which comes first
        for saving in pending:
            began = time.perf_counter()
            try:
                path = saving.finish()
            except SaveFailed as failure:
                failures.append(failure)
                if not must:
                    self._alarm(saving.progress, saving.kind, failure)
                continue
            step = saving.progress.step
            if saving.kind == FULL:
                self.failed = False
            self.remove_old(step, saving.kind)
            complete.setdefault(step, path)
            waited = time.perf_counter() - began
            self.metrics.stalled(waited)
            stall, self.stall = self.stall + waited, 0.0
            self.metrics.after_save(step, path, stall=stall, write=saving.seconds)
        if self.tasks is not None:
            for step, path in complete.items():
                self.tasks.after_save(step, path)
        if must and failures:
            raise failures[0]

    def remove_old(self, step: int, kind: str) -> None:
        """Deletes what checkpoint.keep_last or keep_last_weights do not keep now that `step` is saved; on rank 0."""
        keep, hold = self.config.checkpoint, self.tasks.hold if self.tasks is not None else None
        if self.metrics.writes and kind == FULL:
            remove_old(self.directory, keep_last=keep.keep_last, keep_every=keep.keep_every, written=step, hold=hold)
        elif self.metrics.writes:
            last = keep.keep_last_weights
            remove_old(self.directory, keep_last=last, keep_every=None, kind=WEIGHTS, written=step, hold=hold)

    def finite(self) -> bool:
        """Whether every parameter and moment of the training state is finite."""
        return not any_rank(not held_state_is_finite(self.engine, self.groups.zero_rank), self.engine.device)

    def _start(self, progress: Progress, kinds: list[str], *, must: bool = False) -> None:
        """Copies the state and has it written in the background; what was pending is completed first.

        Raises:
            UserError: on all ranks, if the state is not finite: no run could continue from it, and it would displace
                the last sound one.
        """
        self.finish()
        began = time.perf_counter()
        if not self.finite():
            raise UserError(
                f"at step {progress.step} a parameter or a moment of the optimizer is not finite, which no further step"
                " repairs, so it is not saved and the run ends;"
                f" {where_to_go_on(self.directory, progress.step)}. Lower"
                " optim.lr, or look at the data"
            )
        snapshot = take_snapshot(self.engine, self.config, self.groups, self.memory)
        for kind in kinds:
            part = snapshot if kind == FULL else snapshot.weights()
            try:
                self.pending.append(
                    Saving(part, self.directory, progress, config=self.config, metadata=self.metadata, kind=kind)
                )
            except SaveFailed as failure:
                if must:
                    raise
                self._alarm(progress, kind, failure)
        self.stall = time.perf_counter() - began
        self.metrics.stalled(self.stall)
        if FULL in kinds:
            self.last = time.monotonic()

    def _alarm(self, progress: Progress, kind: str, failure: SaveFailed) -> None:
        if kind == FULL:
            self.failed, self.last = True, time.monotonic()
        self.metrics.note("alarm", f"step {progress.step}: {failure}; the checkpoint before is kept")
