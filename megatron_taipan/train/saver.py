"""Saving during training: at most one checkpoint is on its way, and a failed one does not end the run."""

import time
from pathlib import Path
from typing import Any

from megatron_taipan.checkpoint.folder import remove_old
from megatron_taipan.checkpoint.state import Progress, SaveFailed, Saving
from megatron_taipan.config import Config
from megatron_taipan.parallel.groups import Groups
from megatron_taipan.train.metrics import Metrics


class Saver:
    """Writes checkpoints of a run and keeps the wanted ones; every method but `writing` is collective."""

    def __init__(self, engine: Any, config: Config, metadata: dict[str, Any], groups: Groups, metrics: Metrics):
        self.engine, self.config, self.metadata, self.groups, self.metrics = engine, config, metadata, groups, metrics
        self.directory = Path(config.checkpoint.dir)
        self.pending: Saving | None = None
        self.stall = 0.0  # seconds that training has stood still for the pending one
        self.last = time.monotonic()
        self.failed = False  # the newest save; it is tried again before its turn

    def writing(self) -> bool:
        """Whether this rank is still writing; when no rank is, `finish` completes the checkpoint without waiting."""
        return self.pending is not None and self.pending.writing()

    def overdue(self) -> bool:
        """Whether checkpoint.save_minutes have passed, or after a failed save checkpoint.retry_s."""
        c, waited = self.config.checkpoint, time.monotonic() - self.last
        return (c.save_minutes is not None and waited > 60 * c.save_minutes) or (self.failed and waited > c.retry_s)

    def start(self, progress: Progress) -> None:
        """Copies the state and lets it be written behind the training; the one before is completed first."""
        self.finish()
        began = time.perf_counter()
        try:
            self.pending = Saving(
                self.engine, self.directory, progress, config=self.config, metadata=self.metadata, groups=self.groups
            )
        except SaveFailed as failure:
            self._alarm(progress, failure)
        self.last, self.stall = time.monotonic(), time.perf_counter() - began
        self.metrics.stalled(self.stall)
        if not self.config.checkpoint.asynchronous:
            self.finish()

    def finish(self, *, must: bool = False) -> None:
        """Completes what is pending, waiting for it if need be; with `must` a failure is raised, not only told."""
        if self.pending is None:
            return
        saving, self.pending = self.pending, None
        began = time.perf_counter()
        try:
            path = saving.finish()
        except SaveFailed as failure:
            if must:
                raise
            self._alarm(saving.progress, failure)
            return
        if self.metrics.writes:
            keep = self.config.checkpoint
            remove_old(self.directory, keep_last=keep.keep_last, keep_every=keep.keep_every)
        self.failed = False
        self.metrics.stalled(time.perf_counter() - began)
        stall = self.stall + time.perf_counter() - began
        self.metrics.after_save(saving.progress.step, path, stall=stall, write=saving.seconds)

    def save_last(self, progress: Progress) -> None:
        """Saves and waits; a run that ends must not lose its work quietly.

        Raises:
            SaveFailed: it could not be written.
        """
        self.finish()
        began = time.perf_counter()
        self.pending = Saving(
            self.engine, self.directory, progress, config=self.config, metadata=self.metadata, groups=self.groups
        )
        self.stall = time.perf_counter() - began
        self.finish(must=True)

    def _alarm(self, progress: Progress, failure: SaveFailed) -> None:
        self.failed, self.last = True, time.monotonic()
        self.metrics.note("alarm", f"step {progress.step}: {failure}; the checkpoint before is kept")
