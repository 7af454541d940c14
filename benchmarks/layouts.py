r"""`python -m benchmarks layouts`: the same training step on several GPUs of this host, laid out in several ways.

Each row is a separate run under torchrun: `2 tensor=2 zero_stage=1 micro_batches=4` means two processes, these options
of `parallel`, and four micro-batches a step for each data rank; micro_batch=8 gives them eight rows each. The other
rows are compared with the first.

Long rows, each over two GPUs (`context=2`), against the same rows on one:

    python -m benchmarks layouts --batch 1 --layouts 1 '2 context=2' \
        --overrides data.seq_len=65536 parallel.recompute=full
"""

import argparse
import faulthandler
import json
import os
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import Table, add_preset, median_step_ms, preset

ROOT = Path(__file__).resolve().parents[1]
MARK = "layout "
USUAL = [
    "1",
    *("2", "2 zero_stage=3", "2 tensor=2", "2 tensor=2 micro_batch=8", "2 tensor=2 sequence=false"),
    *("4", "4 zero_stage=3", "4 tensor=2 micro_batch=8", "4 tensor=4 micro_batch=16"),
    *("8", "8 zero_stage=3", "8 tensor=2 micro_batch=8", "8 tensor=4 micro_batch=16"),
]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    add_preset(parser)
    parser.add_argument("--profile", action="store_true", help="also our kernels' times")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # a row's own process
    parser.add_argument("--layouts", nargs="*", help="such as '2 tensor=2 micro_batch=8 micro_batches=4'")
    parser.add_argument("--timeout", type=int, default=600, help="seconds that a row may take")


def run(options: argparse.Namespace) -> None:
    if options.child:
        measure_layout(options)
        return
    table = Table("layouts", options.out)
    for layout in options.layouts or [words for words in USUAL if int(words.split()[0]) <= torch.cuda.device_count()]:
        table.attempt(layout, partial(in_processes, options, layout))
    first = table.rows[0]
    for row in table.rows[1:]:
        if "tokens/s/GPU" in row and "tokens/s/GPU" in first:
            table.add(f"{row['what']} / {first['what']}", ratio=round(row["tokens/s/GPU"] / first["tokens/s/GPU"], 3))


def in_processes(options: argparse.Namespace, layout: str) -> dict:
    """Rank 0's numbers of a run with that layout.

    Raises:
        RuntimeError: it failed; with the last line that says why.
    """
    overrides, processes, batch = settings(layout, options.batch)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += ["-m", "benchmarks", "layouts", "--child", "--preset", options.preset]
    command += ["--batch", str(batch), "--ops", options.ops, "--timeout", str(options.timeout)]
    command += ["--profile"] if options.profile else []
    command += ["--overrides", *overrides, *options.overrides]
    environment = {"OMP_NUM_THREADS": "4"} | os.environ
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=err, text=True)
        try:
            status: int | None = job.wait(options.timeout)
        except subprocess.TimeoutExpired:
            status = None
            job.terminate()  # torchrun passes it on; killed, it would leave its workers, and they the GPUs' memory
            job.wait()
        for file in (out, err):
            file.seek(0)
        texts = [out.read(), err.read()]
    numbers = [line for line in texts[0].splitlines() if line.startswith(MARK)]
    print(*[line for line in texts[0].splitlines() if line.startswith("    ")], sep="\n", flush=True)
    if status != 0 or not numbers:
        print(*(text[-6000:] for text in texts), file=sys.stderr, flush=True)
        late = f"not done within {options.timeout} s" if status is None else "no result"
        raise RuntimeError(next((text for text in reversed(texts[1].splitlines()) if says_why(text)), late))
    return json.loads(numbers[-1].removeprefix(MARK))


def says_why(line: str) -> bool:
    """Whether a line of the processes' messages is an error of their own, not torchrun's that a process failed."""
    return "Error" in line and "ChildFailedError" not in line


def settings(layout: str, batch: int) -> tuple[list[str], int, int]:
    """Overrides of the configuration, number of processes, and rows of a micro-batch, from a layout's words."""
    number, *words = layout.split()
    options = dict(word.split("=") for word in words)
    processes, accumulate = int(number), int(options.pop("micro_batches", 1))
    batch = int(options.pop("micro_batch", batch))
    data = processes // (int(options.get("tensor", 1)) * int(options.get("context", 1)))
    overrides = [f"parallel.{name}={value}" for name, value in options.items()]
    return [*overrides, f"train.global_batch={batch * data * accumulate}"], processes, batch


def measure_layout(options: argparse.Namespace) -> None:
    """One process of a run: measures the median step; rank 0 prints it."""
    import torch.distributed as dist

    from benchmarks.step import our_training, print_profile
    from megatron_taipan.parallel.processes import stop_processes

    faulthandler.dump_traceback_later(max(1, options.timeout - 15))  # where a row hangs
    config = preset(options)
    training = our_training(config)
    ms = median_step_ms(training.step, warm=4)
    tokens = config.train.global_batch * config.data.seq_len
    shares = training.engine.module.layer_metrics.of_gates(training.results[-1].layer_metrics, "selected")
    if dist.get_rank() == 0:
        numbers = {
            "ms": round(ms, 1), "tokens/s/GPU": round(tokens / ms * 1e3 / dist.get_world_size()),
            "GiB a GPU": round(torch.cuda.max_memory_reserved() / 2**30, 1),
            "loss": f"{training.results[0].loss:.3f} -> {training.results[-1].loss:.3f}",
            "selected": round(sum(shares) / max(len(shares), 1), 3),
        }  # fmt: skip
        if (tp := training.engine.module.tp).sequence_parallel:
            numbers["token exchange"] = "collectives" if tp.overlapped_comm is None else "overlapped chunks"
        print(MARK + json.dumps(numbers), flush=True)
    if options.profile:
        if dist.get_rank() == 0:
            print_profile(training.step, top=60, host=False)
        else:
            training.step()
    dist.barrier()
    training.end()
    stop_processes()
    sys.stdout.flush()
    os._exit(0)  # as launch/pretrain.py
