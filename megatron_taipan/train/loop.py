"""The training run, top to bottom: start, steps, stages, saves, end."""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from megatron_taipan.checkpoint.folder import FULL, WEIGHTS, remove_taken_back, step_of
from megatron_taipan.checkpoint.loading import load_training_state
from megatron_taipan.checkpoint.metadata import Progress
from megatron_taipan.checkpoint.stages import finish_stage, go_on_in_stage
from megatron_taipan.checkpoint.verification import rewind_target, where_to_go_on
from megatron_taipan.config import Config
from megatron_taipan.engine.build import accumulation, change_stage, set_learning_rate
from megatron_taipan.engine.ema import update_ema
from megatron_taipan.engine.optimizer import loss_scale
from megatron_taipan.errors import EXIT_REQUEUE, UserError
from megatron_taipan.parallel.all_ranks import run_on_all_ranks
from megatron_taipan.parallel.processes import RankInfo
from megatron_taipan.train.diagnose import first_not_finite
from megatron_taipan.train.distributed import any_rank
from megatron_taipan.train.persistence import save_with_retry
from megatron_taipan.train.run import Run, open_loader, open_stage_data
from megatron_taipan.train.schedule import gate_step, rate_in_stage
from megatron_taipan.train.spikes import after_rewind, remember, z_score
from megatron_taipan.train.start import of_stage, start
from megatron_taipan.train.step import train_step


def train(config: Config, place: RankInfo, device: torch.device) -> int:
    """Trains as configured; every process of the run calls it after `start_processes`.

    Returns:
        The exit status: 0 when finished or stopped at train.stop_at, EXIT_REQUEUE when a signal ended it early.

    Raises:
        UserError: data, layout or checkpoint do not fit, or the loss stays not finite; the same on every rank.
    """
    t = config.train
    with ExitStack() as stack:
        run = start(config, place, device, stack)
        last = min(t.stop_at or t.steps, t.steps)
        run.watchdog.beat()  # the start is done
        stopping = any_rank(run.signals.reason() is not None, device)  # a signal came while it started
        if run.progress.step == 0 and not stopping:
            run.validate()  # what an untrained model scores, to compare with
        while run.progress.step < last and not stopping:
            if run.progress.step == run.stage.last and run.stage is not run.plan[-1]:
                enter_next_stage(run)
            taken = take_step(run)
            stopping, step = taken.stopping, run.progress.step
            if run.streak == t.max_skipped:
                give_up(run)
            if taken.spike is not None and take_back(run, taken.ce, taken.spike):
                continue
            if step == last or (t.eval_every and step % t.eval_every == 0 and not stopping):
                run.validate()
            if stopping and run.tasks is not None:
                run.tasks.stop()  # they end while the state is saved
            if stopping or step == last:
                save_now(run)
            else:
                run.saver.save_due(run.progress, asked=taken.save_asked)
        return end(run, last)


def enter_next_stage(run: Run) -> None:
    """Its data, batch, rows and graphs; weights, moments and the sources' places carry over."""
    run.progress = finish_stage(run.progress, run.stage, run.train_data)
    run.before_streak = run.progress
    run.saver.finish()  # nothing else may run while graphs are captured
    before, run.stage = run.at, run.plan[run.stage.number + 1]
    run.train_data, run.valid_data = run_on_all_ranks(partial(open_stage_data, run.at, run.groups_by_context))
    go_on_in_stage(run.train_data, run.progress)
    run.saver.metadata = of_stage(run.config, run.identity, run.groups) | run.metadata
    del run.loader
    graphs = run_on_all_ranks(lambda: change_stage(run.engine, before, run.at, run.groups, run.device, run.stack))
    run.loader = open_loader(run.at, run.train_data, run.groups, run.progress.samples)
    run.metrics.flops = run.model.num_flops_per_token(run.at.data.seq_len)
    run.note_stage()
    if graphs:
        run.metrics.note("stage", graphs)
    run.watchdog.beat()


class Taken(NamedTuple):
    """What the loop decides on after a step."""

    ce: float
    stopping: bool  # a rank was asked to end
    save_asked: bool  # a checkpoint is overdue by the clock
    spike: float | None  # standard deviations above the last losses, where that is too many


def take_step(run: Run) -> Taken:
    """One step: batches, the update, and what it changes in `run.progress`; logged."""
    at, groups, metrics, progress, t = run.at, run.groups, run.metrics, run.progress, run.config.train
    metrics.start_clock()
    run.profiler.begin(progress.step + 1)
    batches = [to_device(next(run.loader), run.device) for _ in range(accumulation(at, groups.data_size))]
    waited = metrics.seconds()
    lr = rate_in_stage(progress.step, run.stage)
    n_gates = len(run.config.model.gated_layers)
    gate = gate_step(at.model.gate, progress.step, progress.run_steps, progress.shares, n_gates, run.stage)
    set_learning_rate(run.engine, lr)
    result = train_step(
        run.engine, batches, step=progress.step, groups=groups, grad_clip=run.config.optim.grad_clip, gate=gate,
        requests=[run.signals.reason() is not None, run.writes and run.saver.overdue(), run.saver.writing()],
    )  # fmt: skip
    run.profiler.end(progress.step + 1)
    stopping, save_asked, writing = result.requests
    if run.guard is not None:
        run.guard.check()
    if run.tasks is not None:
        run.tasks.poll()
    if not writing:
        run.saver.finish()
    run.watchdog.beat()

    if result.skipped:
        run.before_streak = run.before_streak if run.streak else progress
        run.streak += 1
        if run.streak == 1:
            metrics.note("skipped", first_not_finite(run.engine, batches, step=progress.step, gate=gate))
    else:
        run.streak = 0
        if run.config.optim.ema_decay is not None:
            update_ema(run.averaged, run.config.optim.ema_decay, progress.step - progress.skipped + 1)
    selected = run.model.layer_metrics.of_gates(result.layer_metrics, "selected")
    spike = z_score(progress.recent, result, t)
    run.progress = replace(
        progress,
        step=progress.step + 1,
        samples=progress.samples + at.train.global_batch,
        tokens=progress.tokens + run.stage.tokens_per_step,
        skipped=progress.skipped + result.skipped,
        recent=remember(progress.recent, result, t),
        # where logits were NaN a gate selected nothing: that share must not steer the next step
        shares=progress.shares if result.skipped else selected,
    )
    metrics.after_step(
        run.progress.step, result, lr=lr, gate=gate if n_gates else None, tokens=run.stage.tokens_per_step,
        data_wait_s=waited, loss_scale=loss_scale(run.engine), epochs=run.train_data.epochs(run.progress.samples),
    )  # fmt: skip
    return Taken(result.ce, stopping, save_asked, spike)


def give_up(run: Run) -> None:
    """Saves the state before the steps that were not finite, and ends the run.

    Raises:
        UserError: always.
    """
    good, step = run.before_streak, run.progress.step
    run.saver.finish()
    if good.step > 0 and run.saver.finite():
        save_now(run, good)
    if run.tasks is not None:
        run.tasks.take_back(good.step)
    if run.writes:
        remove_taken_back(run.directory, after=good.step, until=step)
    raise UserError(
        f"the loss or gradient was not finite in {run.streak} steps in a row (train.max_skipped), from step"
        f" {step - run.streak + 1} on; {where_to_go_on(run.directory, good.step)}. Lower"
        " optim.lr, or look at the data of these steps"
    )


def take_back(run: Run, ce: float, z: float) -> bool:
    """After a spike of the loss: goes back to the checkpoint before it, with train.spike_rewind. Whether it did."""
    config, metrics, spiked = run.config, run.metrics, run.progress.step
    metrics.note("spike", f"step {spiked}: loss {ce:.4f} is {z:.1f} standard deviations above the last"
                 f" {config.train.spike_window} (train.spike_z={config.train.spike_z:g})", z=z)  # fmt: skip
    run.saver.finish()
    if not config.train.spike_rewind:
        return False
    good = run_on_all_ranks(lambda: rewind_target(run.directory, config.checkpoint.save_every))
    if good is None:
        return False
    if (step_of(good) or 0) <= run.stage.first > 0:
        metrics.note("warning", f"{good} is of the stage before, so nothing is taken back")
        return False
    loaded = load_training_state(run.engine, good, config=config, identity=run.identity, groups=run.groups)
    saved = loaded.progress
    run.progress = after_rewind(saved, run.progress, z=z, train=config.train)
    if run.tasks is not None:
        run.tasks.take_back(saved.step)
    if run.writes:
        remove_taken_back(run.directory, after=saved.step, until=spiked)
    run.loader = open_loader(run.at, run.train_data, run.groups, run.progress.samples)
    metrics.note("rewind", f"back to {good}, and on from sample {run.progress.samples:,}; samples from"
                 f" {saved.samples:,} on are passed over", **run.progress.rewinds[-1])  # fmt: skip
    return True


def save_now(run: Run, progress: Progress | None = None) -> None:
    """Saves until it is written; `progress`: that of the state which the engine holds, where it is not the run's."""
    save_with_retry(
        run.saver, progress or run.progress, run.config.checkpoint, guard=run.guard, metrics=run.metrics,
        watchdog=run.watchdog,
    )  # fmt: skip


def end(run: Run, last: int) -> int:
    """Waits for the tasks of a run that has finished; the exit status."""
    if run.progress.step < last:
        run.metrics.note("stop", f"stopped by {signal_of(run)}; start the same command again to continue")
        return EXIT_REQUEUE
    if run.tasks is not None:
        undone = run.tasks.finish(lambda: run.signals.reason() is not None, run.watchdog.beat)
        for kind in (FULL, WEIGHTS):
            run.saver.remove_old(run.progress.step, kind)  # what was held for them
        if undone:
            run.metrics.note("stop", f"the run has finished, and {signal_of(run)} came before its tasks had; start the"
                             " same command again to run them")  # fmt: skip
            return EXIT_REQUEUE
    return 0


def signal_of(run: Run) -> str:
    return run.signals.received or "a signal on another rank"


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """A micro-batch on the training device, queued without waiting for it.

    Through pinned memory: a copy from other memory may first wait for all queued work, the last update included.
    """
    if device.type == "cuda":
        batch = {name: value.pin_memory() for name, value in batch.items()}
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
