"""The training run, top to bottom: build, load, loop, save."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_taipan.checkpoint.folder import (
    FULL,
    WEIGHTS,
    remove_leftovers,
    remove_taken_back,
    step_of,
)
from megatron_taipan.checkpoint.loading import Loaded, load_training_state, load_weights
from megatron_taipan.checkpoint.lock import FolderLock
from megatron_taipan.checkpoint.metadata import Progress, changed_settings, identity, read_metadata
from megatron_taipan.checkpoint.randomness import seed_all, set_random_states
from megatron_taipan.checkpoint.stages import finish_stage, go_on_in_stage, stage_under_way, stages_done
from megatron_taipan.checkpoint.verification import find_checkpoint, rewind_target, where_to_go_on
from megatron_taipan.config import Config
from megatron_taipan.data.checksums import Verification
from megatron_taipan.data.loader import SampleDataset, build_dataset, make_loader
from megatron_taipan.data.piece import RowPiece
from megatron_taipan.engine.build import (
    accumulation,
    build_engine,
    capture_graphs,
    change_stage,
    describe_groups,
    describe_width,
    set_learning_rate,
)
from megatron_taipan.engine.ema import begin_ema, update_ema
from megatron_taipan.engine.muon import describe_muon
from megatron_taipan.engine.operations import choose_operations
from megatron_taipan.engine.optimizer import base_optimizer, describe_optimizer, loss_scale
from megatron_taipan.engine.state_shards import held_shards
from megatron_taipan.engine.timeouts import set_timeouts
from megatron_taipan.errors import EXIT_REQUEUE, UserError
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.ops.operations import Ops
from megatron_taipan.parallel.all_ranks import run_on_all_ranks
from megatron_taipan.parallel.connect import connect
from megatron_taipan.parallel.groups import Groups, with_context
from megatron_taipan.parallel.processes import RankInfo
from megatron_taipan.parameters import parameter_table
from megatron_taipan.stages import Stage, describe_stage, plan_stages
from megatron_taipan.train.diagnose import first_not_finite
from megatron_taipan.train.distributed import any_rank
from megatron_taipan.train.evaluate import evaluate
from megatron_taipan.train.metadata import git_commit, layout, versions
from megatron_taipan.train.metrics import Metrics
from megatron_taipan.train.persistence import FolderGuard, save_with_retry
from megatron_taipan.train.profiling import StepProfiler
from megatron_taipan.train.saver import Saver
from megatron_taipan.train.schedule import describe_gate, gate_step, jumps, rate_in_stage
from megatron_taipan.train.shortfalls import shortfalls
from megatron_taipan.train.signals import StopSignals
from megatron_taipan.train.spikes import after_rewind, remember, z_score
from megatron_taipan.train.step import Batch, train_step
from megatron_taipan.train.tasks import Tasks, describe_tasks
from megatron_taipan.train.watchdog import Watchdog
from megatron_taipan.versions import untried_torch


def train(config: Config, place: RankInfo, device: torch.device) -> int:
    """Trains as configured; every process of the run calls it after `start_processes`.

    Returns:
        The exit status: 0 when finished or stopped at train.stop_at, EXIT_REQUEUE when a signal ended it early.

    Raises:
        UserError: data, layout or checkpoint do not fit, or the loss stays not finite; the same on every rank.
    """
    t, p, c = config.train, config.parallel, config.checkpoint
    plan = plan_stages(config)  # without stages one, whose configuration is the run's
    directory, writer = Path(c.dir), place.rank == 0
    with ExitStack() as stack:
        # --- build ---
        signals = stack.enter_context(StopSignals())
        watchdog = stack.enter_context(Watchdog(t.hang_after_s, place.rank))
        settle_numerics(config)
        seed_all(t.seed + place.rank)
        groups, travel = connect(plan[0].config.parallel, device, plan[0].config.data.seq_len)
        pieces = sorted({stage.config.parallel.context for stage in plan})
        groups_by_context = {n: with_context(groups, n, timeout_s=p.timeout_s) for n in pieces}

        def open_stage_data(of: Config) -> tuple[SampleDataset, dict[str | None, SampleDataset]]:
            return open_data(of, RowPiece.held_at(groups_by_context[of.parallel.context].context))

        table = run_on_all_ranks(lambda: parameter_table(config.model))
        treated = describe_muon(config.optim, table) + describe_width(config.model)
        treated += run_on_all_ranks(lambda: describe_groups(config.optim, table))
        # before data is read: a package may be missing
        ops = run_on_all_ranks(lambda: [choose_operations(stage.config) for stage in plan][0])
        done = run_on_all_ranks(lambda: stages_done(config))
        for stage in reversed(plan[done:]):  # the data of later stages only to see that it is there
            train_data, valid_data = run_on_all_ranks(partial(open_stage_data, stage.config))
        verified = [verify(s.config, place, device, watchdog) for s in plan[done:]] if config.data.verify else []
        lock = run_on_all_ranks(lambda: stack.enter_context(FolderLock(directory)) if writer else None)
        run_on_all_ranks(lambda: remove_leftovers(directory) if writer else None)
        found = run_on_all_ranks(lambda: find_checkpoint(config))
        stage = run_on_all_ranks(lambda: find_stage(plan, found.path)) if found and config.stages else plan[0]
        if stage is not plan[done]:  # another checkpoint than the newest, which is damaged
            train_data, valid_data = run_on_all_ranks(lambda: open_stage_data(stage.config))
        at = stage.config  # what holds in the present stage
        groups = groups_by_context[at.parallel.context]
        model = run_on_all_ranks(lambda: build_training_model(at, groups, ops))
        trained_on = [source.prefix for stage in plan for source in stage.config.data.train]
        unlike = run_on_all_ranks(
            lambda: load_weights(model, Path(c.init), config.model, trained_on) if c.init and not found else []
        )
        engine = run_on_all_ranks(lambda: build_engine(model, at, groups, device))
        set_timeouts(p.timeout_s)

        # --- load ---
        ours = identity(at, train_data.fingerprint)
        metadata = {
            "identity": ours, "layout": layout(config, groups), "name": config.name, "versions": versions(),
            "git_commit": git_commit(),
        }  # fmt: skip
        loaded = Loaded(Progress(), {})
        if found:
            loaded = load_training_state(engine, found.path, config=config, identity=ours, groups=groups)
        averaged = []  # what the moving average of the weights is kept of
        if config.optim.ema_decay is not None:
            averaged = held_shards(engine, groups.zero_rank)
            if not found:
                begin_ema(averaged)
        progress = loaded.progress
        if not progress.run_steps:
            progress = replace(progress, run_steps=t.steps)
        go_on_in_stage(train_data, progress)
        n_gates = len(config.model.gated_layers)
        gates = run_on_all_ranks(lambda: [describe_gate(s.config.model.gate, progress.run_steps, s) for s in plan])
        # before the loader's threads: recording tolerates no other calls
        graphs = run_on_all_ranks(lambda: capture_graphs(model, at, device, stack))

        def open_loader(first: int) -> Iterator[Batch]:
            return run_on_all_ranks(lambda: make_loader(
                train_data, start=first, global_batch=at.train.global_batch, micro_batch=at.train.micro_batch,
                dp_rank=groups.data_rank, dp_size=groups.data_size, workers=config.data.workers,
            ))  # fmt: skip

        loader = open_loader(progress.samples)
        run_on_all_ranks(lambda: set_random_states(loaded.random))
        metrics = stack.enter_context(run_on_all_ranks(lambda: Metrics(
            config, progress, flops_per_token=model.num_flops_per_token(at.data.seq_len), devices=place.world_size,
            writes=writer, rank=place.rank,
        )))  # fmt: skip
        for reason in found.passed_over if found else []:
            metrics.note("warning", f"passed over checkpoint {reason}")
        metrics.note("start", f"{config.name}: {model.num_params():,} parameters, {place.world_size} processes on"
                     f" {device.type}, step {progress.step} of {t.steps}; {ops.report}; {graphs};"
                     f" {describe_optimizer(base_optimizer(engine))}" + (f"; {travel}" if travel else "")
                     + (f"; resumed from {found.path}" if found else ""))  # fmt: skip
        for report in verified:
            metrics.note("data", report)

        def note_stage() -> None:
            """What the present stage reads, and its gates' schedules."""
            if config.stages:
                metrics.note("stage", describe_stage(stage))
            metrics.note("data", train_data.describe(at.data.train, stage.steps * at.train.global_batch))
            if n_gates and gates[stage.number]:
                kept = f" (fractions of the {progress.run_steps} steps with which the run began)"
                metrics.note("gate", gates[stage.number] + (kept if progress.run_steps != t.steps else ""))

        note_stage()
        for group in treated:
            metrics.note("optim", group)
        for warning in (*untried_torch(torch.__version__), *shortfalls(config, progress.step, progress.run_steps)):
            metrics.note("warning", warning)
        for line in describe_tasks(config):
            metrics.note("tasks", f"after saves, beside the training: {line}")
        if unlike:
            metrics.note("init", f"the network of checkpoint.init={c.init} computed differently: {'; '.join(unlike)}")
        if loaded.config is not None:
            for change in changed_settings(loaded.config, config):
                metrics.note("changed", f"differs from the checkpoint's {change}")
            for jump in jumps(loaded.config, config, progress.step, progress.run_steps):
                metrics.note("jump", f"at step {progress.step + 1} this start takes {jump}")

        def validate() -> None:
            if valid_data:
                began = time.perf_counter()
                results = {
                    name: evaluate(
                        engine, dataset, samples=t.eval_samples, micro_batch=at.train.micro_batch, groups=groups,
                        device=device, gate=at.model.gate, beat=watchdog.beat,
                    )
                    for name, dataset in valid_data.items()
                }  # fmt: skip
                metrics.after_evaluation(progress.step, results, time.perf_counter() - began)
                watchdog.beat()

        tasks = stack.enter_context(Tasks(config, metrics)) if writer and config.tasks else None
        saver = Saver(engine, config, metadata, groups, metrics, tasks)
        profiler = stack.enter_context(StepProfiler(
            t.profile, directory, rank=place.rank, device=device, say=lambda text: metrics.note("profile", text)
        ))  # fmt: skip
        guard = FolderGuard(lock, metrics) if lock else None
        if tasks is not None:
            tasks.resume(progress.step, found.path if found else None)

        # --- loop ---
        last = min(t.stop_at or t.steps, t.steps)
        streak, before_streak = 0, progress
        watchdog.beat()  # the start is done
        stopping = any_rank(signals.reason() is not None, device)  # a signal came while it started
        if progress.step == 0 and not stopping:
            validate()  # what an untrained model scores, to compare with
        while progress.step < last and not stopping:
            if progress.step == stage.last and stage is not plan[-1]:
                # --- the next stage ---
                progress = finish_stage(progress, stage, train_data)
                before_streak = progress
                saver.finish()  # nothing else may run while graphs are captured
                before, stage = at, plan[stage.number + 1]
                at = stage.config
                train_data, valid_data = run_on_all_ranks(partial(open_stage_data, at))
                go_on_in_stage(train_data, progress)
                ours = identity(at, train_data.fingerprint)
                groups = groups_by_context[at.parallel.context]
                saver.metadata = metadata | {"identity": ours, "layout": layout(config, groups)}
                del loader
                graphs = run_on_all_ranks(partial(change_stage, engine, before, at, groups, device, stack))
                loader = open_loader(progress.samples)
                metrics.flops = model.num_flops_per_token(at.data.seq_len)
                note_stage()
                if graphs:
                    metrics.note("stage", graphs)
                watchdog.beat()
            metrics.start_clock()
            profiler.begin(progress.step + 1)
            batches = [to_device(next(loader), device) for _ in range(accumulation(at, groups.data_size))]
            waited = metrics.seconds()
            lr = rate_in_stage(progress.step, stage)
            gate = gate_step(at.model.gate, progress.step, progress.run_steps, progress.shares, n_gates, stage)
            set_learning_rate(engine, lr)
            result = train_step(
                engine, batches, step=progress.step, groups=groups, grad_clip=config.optim.grad_clip, gate=gate,
                requests=[signals.reason() is not None, writer and saver.overdue(), saver.writing()],
            )  # fmt: skip
            profiler.end(progress.step + 1)
            stopping, save_now, writing = result.requests
            if guard is not None:
                guard.check()
            if tasks is not None:
                tasks.poll()
            if not writing:
                saver.finish()
            watchdog.beat()

            if result.skipped:
                before_streak = before_streak if streak else progress
                streak += 1
                if streak == 1:
                    metrics.note("skipped", first_not_finite(engine, batches, step=progress.step, gate=gate))
            else:
                streak = 0
                if config.optim.ema_decay is not None:
                    update_ema(averaged, config.optim.ema_decay, progress.step - progress.skipped + 1)
            selected = model.layer_metrics.of_gates(result.layer_metrics, "selected")
            spike = z_score(progress.recent, result, t)
            progress = replace(
                progress,
                step=progress.step + 1,
                samples=progress.samples + at.train.global_batch,
                tokens=progress.tokens + stage.tokens_per_step,
                skipped=progress.skipped + result.skipped,
                recent=remember(progress.recent, result, t),
                # where logits were NaN a gate selected nothing: that share must not steer the next step
                shares=progress.shares if result.skipped else selected,
            )
            metrics.after_step(
                progress.step, result, lr=lr, gate=gate if n_gates else None, tokens=stage.tokens_per_step,
                data_wait_s=waited, loss_scale=loss_scale(engine), epochs=train_data.epochs(progress.samples),
            )  # fmt: skip
            if streak == t.max_skipped:
                saver.finish()
                if before_streak.step > 0 and saver.finite():
                    save_with_retry(saver, before_streak, c, guard=guard, metrics=metrics, watchdog=watchdog)
                if tasks is not None:
                    tasks.take_back(before_streak.step)
                if writer:
                    remove_taken_back(directory, after=before_streak.step, until=progress.step)
                raise UserError(
                    f"the loss or gradient was not finite in {streak} steps in a row (train.max_skipped), from step"
                    f" {progress.step - streak + 1} on; {where_to_go_on(directory, before_streak.step)}. Lower"
                    " optim.lr, or look at the data of these steps"
                )

            if spike is not None:
                metrics.note("spike", f"step {progress.step}: loss {result.ce:.4f} is {spike:.1f} standard deviations"
                             f" above the last {t.spike_window} (train.spike_z={t.spike_z:g})", z=spike)  # fmt: skip
                saver.finish()
                good = run_on_all_ranks(lambda: rewind_target(directory, c.save_every)) if t.spike_rewind else None
                if good and (step_of(good) or 0) <= stage.first > 0:
                    metrics.note("warning", f"{good} is of the stage before, so nothing is taken back")
                elif good:
                    saved = load_training_state(engine, good, config=config, identity=ours, groups=groups).progress
                    spiked = progress.step
                    progress = after_rewind(saved, progress, z=spike, train=t)
                    if tasks is not None:
                        tasks.take_back(saved.step)
                    if writer:
                        remove_taken_back(directory, after=saved.step, until=spiked)
                    loader = open_loader(progress.samples)
                    metrics.note("rewind", f"back to {good}, and on from sample {progress.samples:,}; samples from"
                                 f" {saved.samples:,} on are passed over", **progress.rewinds[-1])  # fmt: skip
                    continue

            if progress.step == last or (t.eval_every and progress.step % t.eval_every == 0 and not stopping):
                validate()
            if stopping and tasks is not None:
                tasks.stop()  # they end while the state is saved
            if stopping or progress.step == last:
                save_with_retry(saver, progress, c, guard=guard, metrics=metrics, watchdog=watchdog)
            else:
                saver.save_due(progress, asked=save_now)

        if progress.step < last:
            metrics.note("stop", f"stopped by {signals.received or 'a signal on another rank'}; start the same command"
                         " again to continue")  # fmt: skip
            return EXIT_REQUEUE
        if tasks is not None:
            undone = tasks.finish(lambda: signals.reason() is not None, watchdog.beat)
            for kind in (FULL, WEIGHTS):
                saver.remove_old(progress.step, kind)  # what was held for them
            if undone:
                metrics.note("stop", f"the run has finished, and {signals.received or 'a signal on another rank'} came"
                             " before its tasks had; start the same command again to run them")  # fmt: skip
                return EXIT_REQUEUE
        return 0


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


def open_data(config: Config, piece: RowPiece) -> tuple[SampleDataset, dict[str | None, SampleDataset]]:
    """This rank's piece of the training samples, and of those of each validation set by its name; None is the name of
    one without."""
    vocab_size = config.model.vocab_size
    train_data = build_dataset(config.data, "train", vocab_size, piece)
    if config.data.valid is None and config.data.valid_fraction == 0:
        return train_data, {}
    sets = config.data.valid_sets().items()
    return train_data, {name: build_dataset(data, "valid", vocab_size, piece) for name, data in sets}


def verify(config: Config, place: RankInfo, device: torch.device, watchdog: Watchdog) -> str:
    """Every rank reads its share of the data, a part at a time, so that no rank waits past a timeout for another."""
    verification = run_on_all_ranks(lambda: Verification(config.data, place.rank, place.world_size))
    while any_rank(verification.unfinished, device):
        run_on_all_ranks(verification.go_on)
        watchdog.beat()
    return verification.report()


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """A micro-batch on the training device, queued without waiting for it.

    Through pinned memory: a copy from other memory may first wait for all queued work, the last update included.
    """
    if device.type == "cuda":
        batch = {name: value.pin_memory() for name, value in batch.items()}
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
