"""`python -m benchmarks sync`: does a training step make the host wait for the GPU, and where?

One step runs under torch's profiler: every call that waits is counted by the part of the step in which it happens, and
the trace is kept as JSON (chrome://tracing, ui.perfetto.dev). Another runs with torch's own warnings about waiting,
which name the lines.
"""

import argparse
import collections
import functools
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.common import ROOT, Table, add_preset, preset
from benchmarks.step import Training, our_training

WAITING = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")  # the host waits
CAUSES = ("aten::item", "aten::nonzero", "aten::is_nonzero", "aten::_local_scalar_dense")  # torch's reasons to
COPIES = "copies to the host"
PARTS = ("forward", "backward", "optimizer step")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    add_preset(parser)


def run(options: argparse.Namespace) -> None:
    table = Table("sync", options.out)
    training = our_training(preset(options))
    for _ in range(3):  # kernels compiled, optimizer state made
        training.step()
    torch.cuda.synchronize()
    calls, trace = traced(training)
    path = table.path.with_name("sync_trace.json.gz")
    path.parent.mkdir(parents=True, exist_ok=True)
    trace.export_chrome_trace(str(path))
    for part in (*PARTS, "between them"):
        table.add(part, **{name: calls[part][name] for name in (*WAITING, *CAUSES, COPIES)})
    within = sum(calls[part][name] for part in ("forward", "backward") for name in WAITING)
    table.add("waiting calls within forward and backward", count=within, trace=str(path))
    for line, count in warned(training.step).most_common(20):
        table.add(f"  {line}", times=count)
    training.end()


def traced(training: Training) -> tuple[dict[str, collections.Counter], Any]:
    """Waiting calls of one step by part, and the profile."""
    with parts_marked(training.engine), profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        training.step()
        torch.cuda.synchronize()  # ends the trace; not counted, since it is outside the parts
    return count_waits(list(trace.events())), trace


@contextmanager
def parts_marked(engine: Any) -> Iterator[None]:
    """Names the parts of a step in the profile: the engine's forward, backward and step are wrapped for a while."""
    names = dict(zip(("forward", "backward", "step"), PARTS, strict=True))
    for method, part in names.items():
        setattr(engine, method, _marked(getattr(engine, method), part))
    try:
        yield
    finally:
        for method in names:
            delattr(engine, method)


def _marked(call: Callable, part: str) -> Callable:
    @functools.wraps(call)
    def run(*args: Any, **kwargs: Any) -> Any:
        with record_function(part):
            return call(*args, **kwargs)

    return run


def count_waits(events: list[Any]) -> dict[str, collections.Counter]:
    """Waiting calls by the part during which they began; copies to the host by the call that started them.

    The engine's `backward` waits for autograd's thread, so what that thread does is within its time as well.
    """
    spans = [(e.name, e.time_range.start, e.time_range.end) for e in events if e.name in PARTS]
    result: dict[str, collections.Counter] = {part: collections.Counter() for part in (*PARTS, "between them")}
    for event in events:
        name = COPIES if event.name.startswith("Memcpy DtoH") else event.name
        if name not in (*WAITING, *CAUSES, COPIES):
            continue
        at = event.time_range.start
        part = next((part for part, start, end in spans if start <= at < end), "between them")
        result[part][name] += 1
    return result


def warned(step: Callable[[], None]) -> collections.Counter:
    """Runs a step and returns the lines of Python at which torch saw the host wait, with their counts."""
    lines: collections.Counter = collections.Counter()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "synchroniz" not in str(message):
            return
        stack = [frame for frame in traceback.extract_stack() if "warnings" not in frame.filename][:-1]
        ours = [frame for frame in stack if str(ROOT) in frame.filename]
        frame = (ours or stack)[-1]
        lines[f"{frame.filename.removeprefix(str(ROOT) + '/')}:{frame.lineno} {frame.line}"] += 1

    before = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = before
    return lines
