"""Many short runs, kept in one file of JSON lines: made over as many calls as needed, none twice.

A line is {"run": what was asked for, "result": its result} or, where it failed, {"run": ..., "error": ...}. A later
line of the same run replaces the earlier one.
"""

import gc
import json
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from megatron_taipan.errors import UserError


def key_of(run: dict) -> str:
    """What identifies a run; the same before and after JSON turned tuples into lists."""
    return json.dumps(run, sort_keys=True)


def read_runs(path: Path) -> dict[str, dict]:
    """The last line of each run, by its key. A line that a killed process left unfinished does not count."""
    records = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        records[key_of(record["run"])] = record
    return records


def read_results(path: Path) -> list[dict]:
    """The lines of a file that tables are made of.

    Raises:
        UserError: there are none.
    """
    records = list(read_runs(path).values())
    if not records:
        raise UserError(
            f"--out={path} holds no run, so there is nothing to make tables of; make some runs, or name another file"
        )
    return records


def append_run(path: Path, record: dict) -> None:
    """Adds one line, after whatever a killed process left. One write, so that processes may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        unfinished = file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n"
        file.write((b"\n" if unfinished else b"") + json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def make_runs(
    path: Path,
    wanted: list[dict],
    run: Callable[[dict, Any], dict],
    minutes: float | None = None,
    *,
    devices: Sequence[Any] = (None,),
    expected: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Makes the runs of which the file has no result; one that failed before is tried again.

    Args:
        run: makes one run, on one of the devices.
        minutes: no run starts that would end later, if it takes as long as the longest of this call so far.
        devices: such as GPUs; runs on different devices are made at the same time, on each one after the other.
        expected: seconds that a run is assumed to take until one has ended.
        clock: returns seconds.

    Returns:
        Number of runs that still have no result.
    """
    done = {key for key, record in read_runs(path).items() if "result" in record}
    waiting = deque(what for what in wanted if key_of(what) not in done)
    began, longest, left, one_at_a_time = clock(), expected, len(waiting), threading.Lock()

    def work(device: Any) -> None:
        nonlocal longest, left
        while True:
            with one_at_a_time:
                start = clock()
                if not waiting or (minutes is not None and start - began + longest > 60 * minutes):
                    return
                what = waiting.popleft()
            try:
                record: dict = {"run": what, "result": run(what, device)}
            except Exception as error:  # the others do not depend on it
                traceback.print_exc()
                record = {"run": what, "error": f"{type(error).__name__}: {str(error)[:300]}"}
            gc.collect()  # a failed run's traceback keeps its memory until here
            torch.cuda.empty_cache()
            with one_at_a_time:
                append_run(path, record)
                print(json.dumps(record), flush=True)
                left -= "result" in record
                longest = max(longest, clock() - start)

    if len(devices) == 1:
        work(devices[0])
    else:
        with ThreadPoolExecutor(len(devices)) as pool:
            list(pool.map(work, devices))
    return left
