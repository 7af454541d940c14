"""`python -m benchmarks coldstart`: seconds to the first step, with an empty and with a filled cache of kernels.

Each row is a separate process, as a user's start is; the second finds in TRITON_CACHE_DIR what the first compiled.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.common import Table, add_preset, preset

ROOT = Path(__file__).resolve().parents[1]
MARK = "coldstart "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    add_preset(parser)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # a row's own process


def run(options: argparse.Namespace) -> None:
    if options.child:
        print(MARK + json.dumps(measure_start(options)), flush=True)
        return
    table = Table("coldstart", options.out)
    with tempfile.TemporaryDirectory() as cache:
        for what in ("empty Triton cache", "warm Triton cache"):
            table.attempt(what, lambda: in_a_process(options, cache))


def in_a_process(options: argparse.Namespace, cache: str) -> dict:
    """The numbers of a fresh process that keeps its compiled kernels in `cache`."""
    command = [sys.executable, "-m", "benchmarks", "coldstart", "--child"]
    command += ["--preset", options.preset, "--batch", str(options.batch), "--ops", options.ops]
    command += ["--overrides", *options.overrides]
    began = time.perf_counter()
    environment = os.environ | {"TRITON_CACHE_DIR": cache}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    whole = time.perf_counter() - began
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or not lines:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1])
    kernels = sum(1 for _ in Path(cache).rglob("*.cubin"))
    return json.loads(lines[-1].removeprefix(MARK)) | {"process s": round(whole, 1), "kernels in the cache": kernels}


def measure_start(options: argparse.Namespace) -> dict:
    """Seconds for building model and engine, for the first step and for the second."""
    import torch

    from benchmarks.step import our_training

    began = time.perf_counter()
    training = our_training(preset(options))
    torch.cuda.synchronize()
    numbers = {"build s": round(time.perf_counter() - began, 2)}
    for name in ("first step s", "second step s"):
        began = time.perf_counter()
        training.step()
        torch.cuda.synchronize()
        numbers[name] = round(time.perf_counter() - began, 2)
    return numbers
