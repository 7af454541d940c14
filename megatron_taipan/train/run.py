"""A training run under way: what its start made, and what changes from step to step and from stage to stage."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_taipan.checkpoint.metadata import Progress, identity
from megatron_taipan.config import Config
from megatron_taipan.data.loader import SampleDataset, build_dataset, make_loader
from megatron_taipan.data.piece import RowPiece
from megatron_taipan.parallel.all_ranks import run_on_all_ranks
from megatron_taipan.parallel.groups import Groups
from megatron_taipan.parallel.processes import RankInfo
from megatron_taipan.stages import Stage, describe_stage
from megatron_taipan.train.evaluate import evaluate
from megatron_taipan.train.metrics import Metrics
from megatron_taipan.train.persistence import FolderGuard
from megatron_taipan.train.profiling import StepProfiler
from megatron_taipan.train.saver import Saver
from megatron_taipan.train.signals import StopSignals
from megatron_taipan.train.step import Batch
from megatron_taipan.train.tasks import Tasks
from megatron_taipan.train.watchdog import Watchdog

ValidationSets = dict[str | None, SampleDataset]  # by name; None is the name of one without


@dataclass
class Run:
    """One process's part of a run. `start` makes it, `train` moves it on."""

    config: Config
    plan: list[Stage]  # without stages one, whose configuration is the run's
    place: RankInfo
    device: torch.device
    stack: ExitStack  # what is open until the run ends
    signals: StopSignals
    watchdog: Watchdog
    groups_by_context: dict[int, Groups]  # by the number of pieces of a row, which stages may change
    model: Any
    engine: Any
    averaged: list  # what the moving average of the weights is kept of
    metadata: dict[str, Any]  # of every checkpoint, but for the present stage's part
    gates: list[str]  # the gates' schedules in words, by stage
    metrics: Metrics
    stage: Stage  # the present one, and its data
    train_data: SampleDataset
    valid_data: ValidationSets
    progress: Progress
    loader: Iterator[Batch]
    saver: Saver
    profiler: StepProfiler
    tasks: Tasks | None  # rank 0's, as the next one
    guard: FolderGuard | None
    before_streak: Progress  # before the latest streak of steps that were not finite
    streak: int = 0  # its steps so far; 0 once one was finite

    @property
    def at(self) -> Config:
        """What holds in the present stage."""
        return self.stage.config

    @property
    def groups(self) -> Groups:
        return self.groups_by_context[self.at.parallel.context]

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the present stage."""
        return identity(self.at, self.train_data.fingerprint)

    @property
    def directory(self) -> Path:
        return Path(self.config.checkpoint.dir)

    @property
    def writes(self) -> bool:
        """Whether this process writes the run's folder."""
        return self.place.rank == 0

    def note_stage(self) -> None:
        """Logs what the present stage reads, and its gates' schedules."""
        if self.config.stages:
            self.metrics.note("stage", describe_stage(self.stage))
        wanted = self.stage.steps * self.at.train.global_batch
        self.metrics.note("data", self.train_data.describe(self.at.data.train, wanted))
        gate, began_with = self.gates[self.stage.number], self.progress.run_steps
        if self.config.model.gated_layers and gate:
            kept = f" (fractions of the {began_with} steps with which the run began)"
            self.metrics.note("gate", gate + (kept if began_with != self.config.train.steps else ""))

    def validate(self) -> None:
        """Scores every validation set, if there are any."""
        if not self.valid_data:
            return
        began = time.perf_counter()
        results = {
            name: evaluate(
                self.engine, dataset, samples=self.config.train.eval_samples, micro_batch=self.at.train.micro_batch,
                groups=self.groups, device=self.device, gate=self.at.model.gate, beat=self.watchdog.beat,
            )
            for name, dataset in self.valid_data.items()
        }  # fmt: skip
        self.metrics.after_evaluation(self.progress.step, results, time.perf_counter() - began)
        self.watchdog.beat()


def open_stage_data(config: Config, groups_by_context: dict[int, Groups]) -> tuple[SampleDataset, ValidationSets]:
    """This rank's piece of a stage's training samples, and of those of each validation set."""
    piece = RowPiece.held_at(groups_by_context[config.parallel.context].context)
    vocab_size = config.model.vocab_size
    train_data = build_dataset(config.data, "train", vocab_size, piece)
    if config.data.valid is None and config.data.valid_fraction == 0:
        return train_data, {}
    sets = config.data.valid_sets().items()
    return train_data, {name: build_dataset(data, "valid", vocab_size, piece) for name, data in sets}


def open_loader(config: Config, train_data: SampleDataset, groups: Groups, first: int) -> Iterator[Batch]:
    """This rank's micro-batches from sample `first` on, with a stage's batch."""
    return run_on_all_ranks(lambda: make_loader(
        train_data, start=first, global_batch=config.train.global_batch, micro_batch=config.train.micro_batch,
        dp_rank=groups.data_rank, dp_size=groups.data_size, workers=config.data.workers,
    ))  # fmt: skip
