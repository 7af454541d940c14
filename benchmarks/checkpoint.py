"""How long training pauses for a checkpoint, written in the background or waited for.

    python -m benchmarks checkpoint --config launch/configs/taipan_190m.yaml data.seq_len=64 train.global_batch=1
    torchrun --nproc_per_node 8 -m benchmarks checkpoint --config ...

Trains on random tokens with the real loop, once with checkpoint.asynchronous=true and once with false, saving every few
steps, and reads stall and write time from the run's own log. The first save is listed separately: it allocates the
memory that later ones use again. DIR must have room for two checkpoints.
"""

import argparse
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_taipan.checkpoint.folder import find_newest, read_manifest
from megatron_taipan.checkpoint.run_log import LOG, read_records
from megatron_taipan.config import Config
from megatron_taipan.config_loading import load_config
from megatron_taipan.data.indexed import IndexedWriter
from megatron_taipan.errors import UserError
from megatron_taipan.parallel.processes import RankInfo, device_of_process, find_place, stop_processes
from megatron_taipan.train.distributed import start_processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    parser.add_argument("--config", required=True)
    parser.add_argument("--saves", type=int, default=4, help="checkpoints of each kind")
    parser.add_argument("--steps-between", type=int, default=3)
    parser.add_argument("--dir", type=Path, help="folder on the file system to measure; default: the temporary one")
    parser.add_argument("overrides", nargs="*", help="a.b=c")


def run(args: argparse.Namespace) -> None:
    """Prints a table on rank 0."""
    if args.saves < 1 or args.steps_between < 1:
        raise UserError(f"--saves {args.saves} --steps-between {args.steps_between}: give at least 1 of each")
    place = find_place(os.environ)
    device = device_of_process(place)
    start_processes(place, device, 1800)
    shared: list[Any] = [tempfile.mkdtemp(prefix="benchmark-checkpoint-", dir=args.dir) if place.rank == 0 else None]
    dist.broadcast_object_list(shared, src=0)
    folder = Path(shared[0])
    try:
        for asynchronous in (True, False):
            directory = folder / ("behind" if asynchronous else "waiting")
            config = make_run_config(args, folder, directory, asynchronous, place)
            train_run(config, place, device)
            if place.rank == 0:
                print_saves(directory, asynchronous, place.world_size)
                shutil.rmtree(directory)
    finally:
        dist.barrier()
        if place.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    stop_processes()


def make_run_config(
    args: argparse.Namespace, folder: Path, directory: Path, asynchronous: bool, place: RankInfo
) -> Config:
    """The configuration of one measurement, with data of random tokens."""
    options = [
        f"data.train={folder / 'data'}", "data.valid_fraction=0", f"checkpoint.dir={directory}",
        f"checkpoint.asynchronous={str(asynchronous).lower()}", f"checkpoint.save_every={args.steps_between}",
        "checkpoint.keep_last=1", f"train.steps={args.steps_between * args.saves + 1}", "log.tensorboard=false",
        "log.progress=false", "optim.warmup_steps=0",
    ]  # fmt: skip
    config = load_config(args.config, [*args.overrides, *options])
    if place.rank == 0 and not (folder / "data.bin").exists():
        tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, 64 * config.data.seq_len + 1)
        with IndexedWriter(folder / "data", np.int32) as writer:
            writer.add_document(tokens)
    dist.barrier()
    return config


def train_run(config: Config, place: RankInfo, device: torch.device) -> None:
    """Trains; the run's log.jsonl holds the figures."""
    from megatron_taipan.train.loop import train

    train(config, place, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def print_saves(directory: Path, asynchronous: bool, processes: int) -> None:
    """Prints what the log says about the saves during training."""
    records = list(read_records(directory / LOG))
    saves = [record for record in records if record["event"] == "save"][:-1]  # a run waits for its last one
    steps = [record["step_s"] for record in records if record["event"] == "step"][1:]
    newest = find_newest(directory)
    size = sum(size for size, _ in read_manifest(newest.path).values()) if newest else 0
    stalls, writes = ([save[key] for save in saves] for key in ("stall_s", "write_s"))
    kind = "in the background" if asynchronous else "waited for"
    print(
        f"{kind:<20} {processes} processes, {size / 1e9:.2f} GB: stall first {stalls[0]:.2f} s, then median"
        f" {statistics.median(stalls[1:] or stalls):.2f} s; write {statistics.median(writes):.2f} s;"
        f" step {statistics.median(steps):.2f} s",
        flush=True,
    )
