"""The training run, top to bottom: build, load, loop, save."""

import time
from pathlib import Path

import torch

from megatron_taipan.checkpoint import state
from megatron_taipan.checkpoint.folder import Found, checkpoints, find_newest, locate, remove_leftovers, remove_old
from megatron_taipan.checkpoint.identity import identity
from megatron_taipan.config import Config, dump_config
from megatron_taipan.data.loader import SampleDataset, build_dataset, make_loader
from megatron_taipan.errors import UserError
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.ops.dispatch import pick_ops
from megatron_taipan.parallel.groups import build_groups
from megatron_taipan.train.distributed import Place, agree
from megatron_taipan.train.engine import accumulation, build_engine, set_learning_rate
from megatron_taipan.train.evaluate import evaluate
from megatron_taipan.train.metadata import git_commit, layout, versions
from megatron_taipan.train.metrics import Metrics
from megatron_taipan.train.schedule import learning_rate
from megatron_taipan.train.signals import EXIT_REQUEUE, StopSignals
from megatron_taipan.train.step import train_step


def train(config: Config, place: Place, device: torch.device) -> int:
    """Trains as configured; every process of the run calls it after `start_processes`.

    Returns:
        The exit status: 0 when finished or stopped at train.stop_at, EXIT_REQUEUE when a signal ended it early.

    Raises:
        UserError: data, layout or checkpoint do not fit; the same on every rank.
    """
    t, p, c = config.train, config.parallel, config.checkpoint
    writer = place.rank == 0
    settle_numerics(config)
    groups = build_groups(
        world_size=place.world_size, rank=place.rank, tensor=p.tensor, pipeline=p.pipeline,
        sequence_parallel=p.sequence, timeout_s=p.timeout_s,
    )  # fmt: skip
    train_data, valid_data = agree(lambda: open_data(config))
    found = agree(lambda: find_checkpoint(config, tidy=writer))

    model = Taipan(
        config.model, seed=t.seed, tensor_parallel=groups.tensor, ops=agree(lambda: pick_ops(config.ops.backend)),
        recompute=p.recompute, recompute_every=p.recompute_every,
    )  # fmt: skip
    flops_per_token = model.num_flops_per_token(config.data.seq_len)
    engine = agree(lambda: build_engine(model, config, groups, device))
    ours = identity(config, train_data.fingerprint, layout(config, groups))
    metadata = {"identity": ours, "name": config.name, "versions": versions(), "git_commit": git_commit()}
    progress = state.load(engine, found.path, identity=ours) if found else state.Progress()

    last = min(t.stop_at or t.steps, t.steps)
    micro_batches = accumulation(config, groups.data_size)
    loader = make_loader(
        train_data, start=progress.samples, global_batch=t.global_batch, micro_batch=t.micro_batch,
        dp_rank=groups.data_rank, dp_size=groups.data_size, workers=config.data.workers,
    )  # fmt: skip
    metrics = Metrics(
        config, start_step=progress.step, flops_per_token=flops_per_token, devices=place.world_size, writes=writer
    )
    for reason in found.passed_over if found else []:
        metrics.note("warning", f"passed over checkpoint {reason}")
    metrics.note("start", f"{config.name}: {model.num_params():,} parameters, {place.world_size} processes on"
                 f" {device.type}, step {progress.step} of {last}" + (f", resumed from {found.path}" if found else ""))  # fmt: skip

    def validate() -> None:
        if valid_data is not None:
            began = time.perf_counter()
            result = evaluate(
                engine, valid_data, samples=t.eval_samples, micro_batch=t.micro_batch, groups=groups, device=device
            )
            metrics.after_evaluation(progress.step, result, time.perf_counter() - began)

    def save() -> None:
        began = time.perf_counter()
        path = state.save(engine, Path(c.dir), progress, config_text=dump_config(config), metadata=metadata)
        if writer:
            remove_old(Path(c.dir), keep_last=c.keep_last, keep_every=c.keep_every)
        metrics.after_save(progress.step, path, time.perf_counter() - began)

    saved_at, stopping = progress.step, False
    if progress.step == 0:
        validate()  # what an untrained model scores, to compare with
    metrics.start_clock()
    with StopSignals() as signals:
        while progress.step < last and not stopping:
            began = time.perf_counter()
            batches = [to_device(next(loader), device) for _ in range(micro_batches)]
            waited = time.perf_counter() - began
            lr = learning_rate(progress.step, config.optim, t.steps)
            set_learning_rate(engine, lr)
            result = train_step(
                engine, batches, step=progress.step, groups=groups, requests=[signals.received is not None]
            )
            stopping = result.requests[0]

            progress.step += 1
            progress.samples += t.global_batch
            progress.tokens += t.global_batch * config.data.seq_len
            progress.skipped += result.skipped
            metrics.after_step(
                progress.step, result, lr=lr, tokens=t.global_batch * config.data.seq_len, data_wait_s=waited
            )
            finished = progress.step == last or stopping
            if progress.step == last or (t.eval_every and progress.step % t.eval_every == 0 and not stopping):
                validate()
            if finished or (c.save_every and progress.step % c.save_every == 0):
                save()
                saved_at = progress.step
            metrics.start_clock()

    if stopping and progress.step < last:
        metrics.note("stop", f"stopped by {signals.received or 'a signal on another rank'} after step {progress.step};"
                     f" the checkpoint of step {saved_at} continues it")  # fmt: skip
    metrics.close()
    return EXIT_REQUEUE if stopping and progress.step < last else 0


def settle_numerics(config: Config) -> None:
    """Process-wide switches of torch that decide about rounding."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.train.tf32
    if config.train.deterministic:
        torch.use_deterministic_algorithms(True)


def open_data(config: Config) -> tuple[SampleDataset, SampleDataset | None]:
    """The training samples, and the validation samples unless the configuration has none."""
    train_data = build_dataset(config.data, "train", config.model.vocab_size)
    if config.data.valid is None and config.data.valid_fraction == 0:
        return train_data, None
    return train_data, build_dataset(config.data, "valid", config.model.vocab_size)


def find_checkpoint(config: Config, *, tidy: bool) -> Found | None:
    """The checkpoint to start from, by checkpoint.load; None to start anew.

    Args:
        tidy: remove what a killed run left half written (one rank only).

    Raises:
        UserError: a new run was asked for in a folder that holds one, or the wanted checkpoint is not there.
    """
    directory, wanted = Path(config.checkpoint.dir), config.checkpoint.load
    if tidy:
        remove_leftovers(directory)
    found = find_newest(directory)
    if wanted is None:
        if checkpoints(directory):
            raise UserError(
                f"checkpoint.load=null starts a new run, but {directory} holds checkpoints up to"
                f" {checkpoints(directory)[-1].name}; choose another checkpoint.dir, or checkpoint.load=auto to resume"
            )
        return None
    if found is None and checkpoints(directory):
        names = ", ".join(path.name for path in checkpoints(directory))
        raise UserError(f"{directory} holds only damaged checkpoints ({names}); delete them to start anew")
    if found is not None or wanted == "auto":
        return found
    return Found(locate(wanted), [])


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """A micro-batch on the training device; the copy overlaps with computation where memory is pinned."""
    return {name: value.to(device, non_blocking=True) for name, value in batch.items()}
