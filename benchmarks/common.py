"""What all benchmarks share: a table that is printed and kept as JSON, timers, a preset as a run on one GPU."""

import argparse
import gc
import json
import os
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import suppress
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from megatron_taipan.config import Config
from megatron_taipan.config_loading import load_config
from megatron_taipan.train.peaks import known_peak

ROOT = Path(__file__).resolve().parents[1]


class Table:
    """Rows of one benchmark, printed as they are measured and kept as JSON."""

    def __init__(self, name: str, out: Path):
        self.path = out / f"benchmark_{name}.json"
        self.rows: list[dict[str, Any]] = []
        self.about = hardware()
        print("; ".join(f"{k}: {v}" for k, v in self.about.items()), flush=True)

    def add(self, what: str, **numbers: Any) -> None:
        self.rows.append({"what": what, **numbers})
        print(f"{what:52s} " + "  ".join(f"{k} {v}" for k, v in numbers.items()), flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        with part.open("w", encoding="utf-8") as file:
            json.dump({"about": self.about, "rows": self.rows}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)

    def ratios(self, ours: str, key: str) -> None:
        """Adds rows with our row's `key` divided by every other row's."""
        mine = next((row[key] for row in self.rows if row["what"] == ours and key in row), None)
        for row in [row for row in self.rows if mine and key in row and row["what"] != ours]:
            self.add(f"{ours} / {row['what']}", ratio=round(mine / row[key], 3))

    def attempt(self, what: str, measure: Callable[[], dict]) -> None:
        """Adds what `measure` returns; for a peer that is missing or does not fit, a row that says so."""
        try:
            numbers = measure()
        except (ImportError, torch.OutOfMemoryError, RuntimeError) as error:
            traceback.print_exc()
            numbers = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"}
        self.add(what, **numbers)
        gc.collect()
        torch.cuda.empty_cache()


def hardware() -> dict[str, str]:
    """The GPU and the versions that the numbers belong to."""
    about = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    for package in ("triton", "deepspeed", "mamba_ssm", "causal_conv1d", "flash_attn"):
        try:
            about[package] = __import__(package).__version__
        except Exception as error:  # a peer that does not import is listed as missing
            about[package] = f"missing ({type(error).__name__})"
    for package in ("liger_kernel", "cut_cross_entropy"):  # their modules do not say
        with suppress(metadata.PackageNotFoundError):
            about[package] = metadata.version(package)
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
        peak = known_peak(about["gpu"])
        about["bf16 peak"] = f"{peak:g} TFLOP/s" if peak else "unknown peak"
    return about


def median_ms(
    run: Callable[[], Any], repeats: int = 11, warm: int = 3, before: Callable[[], Any] = lambda: None
) -> float:
    """Milliseconds of a short operation on the GPU, the median of `repeats` runs.

    The GPU first sleeps for a few milliseconds, so that all launches are queued before the operation starts and the
    time is the GPU's, not the CPU's.

    Args:
        before: called before that, such as a barrier that starts several GPUs together.
    """
    for _ in range(warm):
        run()
    times = []
    for _ in range(repeats):
        before()
        torch.cuda._sleep(20_000_000)  # cycles, about 11 ms
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def recorded(run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A CUDA graph of run() after a warm-up call, and what the recorded call returned, which replays overwrite."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        run()
    torch.cuda.current_stream().wait_stream(aside)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        results = run()
    return graph, results


def median_step_ms(step: Callable[[], Any], repeats: int = 7, warm: int = 3) -> float:
    """Milliseconds of a training step in a row of steps, the median of `repeats`, gaps between kernels included.

    As in training, nothing waits for the GPU between steps: the host launches the next one while the last one's update
    still runs.
    """
    for _ in range(warm):
        step()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    marks[-1].synchronize()
    return sorted(start.elapsed_time(end) for start, end in pairwise(marks))[repeats // 2]


def kernel_times(run: Callable[[], Any], top: int) -> dict[str, float]:
    """Milliseconds by kernel ("launches x name") of one run, the longest first; before them their sum, how long no
    kernel ran, and the number of launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    times, launches = defaultdict[str, float](float), Counter[str]()
    spans = []
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[short_kernel_name(event.name)] += event.time_range.elapsed_us() / 1e3
            launches[short_kernel_name(event.name)] += 1
            spans.append((event.time_range.start, event.time_range.end))
    idle, covered = 0.0, min(spans)[1]
    for start, end in sorted(spans):
        idle += max(0.0, start - covered)
        covered = max(covered, end)
    about = {"all kernels": round(sum(times.values()), 2), "idle": round(idle / 1e3, 2), "launches": len(spans)}
    longest = sorted(times.items(), key=lambda item: -item[1])[:top]
    return about | {f"{launches[name]:4d} x {name}": round(ms, 3) for name, ms in longest}


def short_kernel_name(kernel: str) -> str:
    """A kernel's name without the prefixes that torch's kernels share."""
    for common in ("void ", "at::native::", "(anonymous namespace)::", "std::"):
        kernel = kernel.replace(common, "")
    return kernel[:150]


def add_out(parser: argparse.ArgumentParser) -> None:
    """Where tables are kept."""
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the JSON files")


def add_preset(parser: argparse.ArgumentParser) -> None:
    """What `preset` reads, and where tables are kept."""
    parser.add_argument("--preset", default="taipan_1.3b", help="a file of launch/configs, without its ending")
    parser.add_argument("--batch", type=int, default=4, help="micro batch")
    parser.add_argument("--ops", default="fast", choices=["fast", "auto", "reference"])
    parser.add_argument("--overrides", nargs="*", default=[], help="settings such as model.gate.capacity=0.3")
    add_out(parser)


def preset(options: argparse.Namespace) -> Config:
    """A preset as a run on one GPU: one micro batch a step."""
    overrides = [f"train.global_batch={options.batch}", f"train.micro_batch={options.batch}"]
    overrides += ["parallel.recompute=none", f"ops.backend={options.ops}", *options.overrides]
    return load_config(ROOT / "launch" / "configs" / f"{options.preset}.yaml", overrides)


def join_processes(config: Config) -> tuple[torch.device, Any]:
    """This process's GPU and the process groups of the configured layout; one process where no launcher ran."""
    import torch.distributed as dist

    from megatron_taipan.parallel.connect import connect
    from megatron_taipan.parallel.processes import device_of_process, find_place
    from megatron_taipan.train.distributed import start_processes

    place = find_place(os.environ)
    device = device_of_process(place)
    if not dist.is_initialized():
        start_processes(place, device, config.parallel.timeout_s)
    return device, connect(config.parallel, device, config.data.seq_len)[0]
