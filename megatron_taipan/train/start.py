"""The start of a training run: build, load, and log what runs."""

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_taipan.checkpoint.folder import Found, remove_leftovers
from megatron_taipan.checkpoint.loading import Loaded, load_training_state, load_weights
from megatron_taipan.checkpoint.lock import FolderLock
from megatron_taipan.checkpoint.metadata import Progress, changed_settings, identity, read_metadata
from megatron_taipan.checkpoint.randomness import seed_all, set_random_states
from megatron_taipan.checkpoint.stages import go_on_in_stage, stage_under_way, stages_done
from megatron_taipan.checkpoint.verification import find_checkpoint, refuse_load
from megatron_taipan.config import Config
from megatron_taipan.data.checksums import Verification
from megatron_taipan.data.loader import SampleDataset
from megatron_taipan.engine.build import build_engine, capture_graphs, describe_groups, describe_width
from megatron_taipan.engine.ema import begin_ema
from megatron_taipan.engine.muon import describe_muon
from megatron_taipan.engine.operations import choose_operations
from megatron_taipan.engine.optimizer import base_optimizer, describe_optimizer
from megatron_taipan.engine.state_shards import held_shards
from megatron_taipan.engine.timeouts import set_timeouts
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.ops.operations import Ops
from megatron_taipan.parallel.all_ranks import run_on_all_ranks
from megatron_taipan.parallel.connect import connect
from megatron_taipan.parallel.groups import Groups, with_context
from megatron_taipan.parallel.processes import RankInfo
from megatron_taipan.parameters import parameter_table
from megatron_taipan.stages import Stage, plan_stages
from megatron_taipan.train.distributed import any_rank
from megatron_taipan.train.metadata import git_commit, layout, versions
from megatron_taipan.train.metrics import Metrics
from megatron_taipan.train.persistence import FolderGuard
from megatron_taipan.train.profiling import StepProfiler
from megatron_taipan.train.run import Run, ValidationSets, open_loader, open_stage_data
from megatron_taipan.train.saver import Saver
from megatron_taipan.train.schedule import describe_gate, jumps
from megatron_taipan.train.shortfalls import shortfalls
from megatron_taipan.train.signals import StopSignals
from megatron_taipan.train.tasks import Tasks, describe_tasks
from megatron_taipan.train.watchdog import Watchdog
from megatron_taipan.versions import untried_torch


def start(config: Config, place: RankInfo, device: torch.device, stack: ExitStack) -> Run:
    """Builds the run and loads its newest checkpoint, if there is one.

    Args:
        stack: what it opens is closed there.

    Raises:
        UserError: data, layout or checkpoint do not fit; the same on every rank.
    """
    t, p, c = config.train, config.parallel, config.checkpoint
    plan = plan_stages(config)
    signals = stack.enter_context(StopSignals())
    watchdog = stack.enter_context(Watchdog(t.hang_after_s, place.rank))
    settle_numerics(config)
    seed_all(t.seed + place.rank)
    groups, travel = connect(plan[0].config.parallel, device, plan[0].config.data.seq_len)
    pieces = sorted({stage.config.parallel.context for stage in plan})
    groups_by_context = {n: with_context(groups, n, timeout_s=p.timeout_s) for n in pieces}
    table = run_on_all_ranks(lambda: parameter_table(config.model))
    treated = describe_muon(config.optim, table) + describe_width(config.model)
    treated += run_on_all_ranks(lambda: describe_groups(config.optim, table))
    # before data is read: a package may be missing
    ops = run_on_all_ranks(lambda: choose_operations(*(stage.config for stage in plan)))
    there = open_files(config, plan, groups_by_context, place, device, watchdog, stack)
    found, stage, train_data = there.checkpoint, there.stage, there.train_data
    at, groups = stage.config, groups_by_context[stage.config.parallel.context]

    # --- build ---
    model = run_on_all_ranks(lambda: build_training_model(at, groups, ops))
    trained_on = [source.prefix for stage in plan for source in stage.config.data.train]
    unlike = run_on_all_ranks(
        lambda: load_weights(model, Path(c.init), config.model, trained_on) if c.init and not found else []
    )
    engine = run_on_all_ranks(lambda: build_engine(model, at, groups, device))
    set_timeouts(p.timeout_s)

    # --- load ---
    ours = identity(at, train_data.fingerprint)
    loaded = Loaded(Progress(), {})
    if found:
        loaded = load_training_state(engine, found.path, config=config, identity=ours, groups=groups)
    averaged = []
    if config.optim.ema_decay is not None:
        averaged = held_shards(engine, groups.zero_rank)
        if not found:
            begin_ema(averaged)
    progress = loaded.progress
    if not progress.run_steps:
        progress = replace(progress, run_steps=t.steps)
    go_on_in_stage(train_data, progress)
    gates = run_on_all_ranks(lambda: [describe_gate(s.config.model.gate, progress.run_steps, s) for s in plan])
    # before the loader's threads: recording tolerates no other calls
    graphs = run_on_all_ranks(lambda: capture_graphs(model, at, device, stack))
    loader = open_loader(at, train_data, groups, progress.samples)
    run_on_all_ranks(lambda: set_random_states(loaded.random))

    # --- what logs and saves ---
    metrics = stack.enter_context(run_on_all_ranks(lambda: Metrics(
        config, progress, flops_per_token=model.num_flops_per_token(at.data.seq_len), devices=place.world_size,
        writes=place.rank == 0, rank=place.rank,
    )))  # fmt: skip
    metadata = {"name": config.name, "versions": versions(), "git_commit": git_commit()}
    tasks = stack.enter_context(Tasks(config, metrics)) if place.rank == 0 and config.tasks else None
    saver = Saver(engine, config, of_stage(config, ours, groups) | metadata, groups, metrics, tasks)
    profiler = stack.enter_context(StepProfiler(
        t.profile, Path(c.dir), rank=place.rank, device=device, say=lambda text: metrics.note("profile", text)
    ))  # fmt: skip
    run = Run(
        config=config, plan=plan, place=place, device=device, stack=stack, signals=signals, watchdog=watchdog,
        groups_by_context=groups_by_context, model=model, engine=engine, averaged=averaged, metadata=metadata,
        gates=gates, metrics=metrics, stage=stage, train_data=train_data, valid_data=there.valid_data,
        progress=progress, loader=loader, saver=saver, profiler=profiler, tasks=tasks,
        guard=FolderGuard(there.lock, metrics) if there.lock else None, before_streak=progress,
    )  # fmt: skip
    what = [ops.report, graphs, describe_optimizer(base_optimizer(engine)), *([travel] if travel else [])]
    log_start(run, found, loaded, what, there.verified, treated, unlike)
    if tasks is not None:
        tasks.resume(progress.step, found.path if found else None)
    return run


@dataclass(frozen=True)
class Files:
    """What a run's folder and data hold at its start."""

    checkpoint: Found | None  # where it goes on
    stage: Stage  # in which that was written
    train_data: SampleDataset  # of this stage, as the next one
    valid_data: ValidationSets
    verified: list[str]  # in words, what data.verify has read
    lock: FolderLock | None  # rank 0's


def open_files(
    config: Config, plan: list[Stage], groups_by_context: dict[int, Groups], place: RankInfo, device: torch.device,
    watchdog: Watchdog, stack: ExitStack,
) -> Files:  # fmt: skip
    """Opens the data of every stage that is not done, locks the folder, and looks for the checkpoint to go on from.

    Raises:
        UserError: data are missing or damaged, the folder is another run's or in use, no checkpoint in it is sound.
    """
    directory, writer = Path(config.checkpoint.dir), place.rank == 0
    run_on_all_ranks(lambda: refuse_load(config) if writer else None)  # before anything is written
    done = run_on_all_ranks(lambda: stages_done(config))
    for stage in reversed(plan[done:]):  # the data of later stages only to see that it is there
        train_data, valid_data = run_on_all_ranks(partial(open_stage_data, stage.config, groups_by_context))
    verified = [verify(s.config, place, device, watchdog) for s in plan[done:]] if config.data.verify else []
    lock = run_on_all_ranks(lambda: stack.enter_context(FolderLock(directory)) if writer else None)
    run_on_all_ranks(lambda: remove_leftovers(directory) if writer else None)
    found = run_on_all_ranks(lambda: find_checkpoint(config))
    stage = run_on_all_ranks(lambda: find_stage(plan, found.path)) if found and config.stages else plan[0]
    if stage is not plan[done]:  # another checkpoint than the newest, which is damaged
        train_data, valid_data = run_on_all_ranks(lambda: open_stage_data(stage.config, groups_by_context))
    return Files(found, stage, train_data, valid_data, verified, lock)


def log_start(
    run: Run, found: Found | None, loaded: Loaded, what: list[str], verified: list[str], treated: list[str],
    unlike: list[str],
) -> None:  # fmt: skip
    """Everything that a reader of the log should know about this start.

    Args:
        what: operations, graphs and kernels that run; verified: which data were read; treated: groups of parameters;
            unlike: how the network of checkpoint.init differs.
    """
    config, metrics, progress = run.config, run.metrics, run.progress
    for reason in found.passed_over if found else []:
        metrics.note("warning", f"passed over checkpoint {reason}")
    metrics.note("start", f"{config.name}: {run.model.num_params():,} parameters, {run.place.world_size} processes on"
                 f" {run.device.type}, step {progress.step} of {config.train.steps}; {'; '.join(what)}"
                 + (f"; resumed from {found.path}" if found else ""))  # fmt: skip
    for report in verified:
        metrics.note("data", report)
    run.note_stage()
    for group in treated:
        metrics.note("optim", group)
    for warning in (*untried_torch(torch.__version__), *shortfalls(config, progress.step, progress.run_steps)):
        metrics.note("warning", warning)
    for line in describe_tasks(config):
        metrics.note("tasks", f"after saves, beside the training: {line}")
    if unlike:
        source = config.checkpoint.init
        metrics.note("init", f"the network of checkpoint.init={source} computed differently: {'; '.join(unlike)}")
    if loaded.config is not None:
        for change in changed_settings(loaded.config, config):
            metrics.note("changed", f"differs from the checkpoint's {change}")
        for jump in jumps(loaded.config, config, progress.step, progress.run_steps):
            metrics.note("jump", f"at step {progress.step + 1} this start takes {jump}")


def of_stage(config: Config, ours: dict[str, Any], groups: Groups) -> dict[str, Any]:
    """A stage's part of the metadata of its checkpoints; `ours` is its identity."""
    return {"identity": ours, "layout": layout(config, groups)}


def find_stage(plan: list[Stage], path: Path) -> Stage:
    """The stage in which a checkpoint was written; see `stage_under_way`."""
    progress = read_metadata(path)["progress"]
    return stage_under_way(plan, len(progress.get("finished", [])), progress["step"], str(path))


def build_training_model(config: Config, groups: Groups, ops: Ops) -> Any:
    """The network, or this process's pipeline stage of it."""
    p = config.parallel
    if p.pipeline > 1:
        from megatron_taipan.engine.pipeline import TaipanPipeline

        return TaipanPipeline(config, groups, ops)
    return Taipan(
        config.model, seed=config.train.seed, tensor_parallel=groups.tensor, context_parallel=groups.context, ops=ops,
        recompute=p.recompute, recompute_every=p.recompute_every,
    )  # fmt: skip


def settle_numerics(config: Config) -> None:
    """Process-wide switches of torch that affect rounding."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.train.tf32
    if config.train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it, before its first call
        torch.use_deterministic_algorithms(True)


def verify(config: Config, place: RankInfo, device: torch.device, watchdog: Watchdog) -> str:
    """Every rank reads its share of the data, a part at a time, so that no rank waits past a timeout for another."""
    verification = run_on_all_ranks(lambda: Verification(config.data, place.rank, place.world_size))
    while any_rank(verification.unfinished, device):
        run_on_all_ranks(verification.go_on)
        watchdog.beat()
    return verification.report()
