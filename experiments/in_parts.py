"""Many short runs, kept in one file of JSON lines: made in as many calls as it takes, none twice.

A line is {"run": what was asked for, "result": what came of it} or, where it failed, {"run": ..., "error": ...}. A
later line of the same run stands for the earlier one.
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
    """What tells runs apart; the same before and after JSON made lists of tuples."""
    return json.dumps(run, sort_keys=True)


def read(path: Path) -> dict[str, dict]:
    """The last line of each run, by its key. A line that a killed process left unfinished does not count."""
    records = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        records[key_of(record["run"])] = record
    return records


def read_made(path: Path) -> list[dict]:
    """The lines of a file that tables are made of.

    Raises:
        UserError: there are none.
    """
    records = list(read(path).values())
    if not records:
        raise UserError(f"--out={path} holds no run, so there is nothing to make tables of; make some, or name a file")
    return records


def append(path: Path, record: dict) -> None:
    """Adds one line, behind whatever a killed process left. One write, so that processes may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        unfinished = file.seek(0, os.SEEK_END) and (file.seek(-1, os.SEEK_END), file.read())[1] != b"\n"
        file.write((b"\n" if unfinished else b"") + json.dumps(record).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def make(
    path: Path,
    wanted: list[dict],
    run: Callable[[dict, Any], dict],
    minutes: float | None = None,
    *,
    places: Sequence[Any] = (None,),
    expected: float = 0.0,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Makes the runs that the file has no result of; one that failed before is tried again.

    Args:
        run: makes one, at one of the places.
        minutes: no run starts that would end later, if it takes as long as the longest of this call so far.
        places: where runs are made side by side, such as GPUs; each takes one after the other.
        expected: seconds that a run takes, as long as none has ended.
        clock: seconds.

    Returns:
        Number of runs that still have no result.
    """
    done = {key for key, record in read(path).items() if "result" in record}
    waiting = deque(what for what in wanted if key_of(what) not in done)
    began, longest, left, one_at_a_time = clock(), expected, len(waiting), threading.Lock()

    def work(place: Any) -> None:
        nonlocal longest, left
        while True:
            with one_at_a_time:
                start = clock()
                if not waiting or (minutes is not None and start - began + longest > 60 * minutes):
                    return
                what = waiting.popleft()
            try:
                record: dict = {"run": what, "result": run(what, place)}
            except Exception as error:  # the others do not depend on it
                traceback.print_exc()
                record = {"run": what, "error": f"{type(error).__name__}: {str(error)[:300]}"}
            gc.collect()  # a failed run's memory is held by its traceback until here
            torch.cuda.empty_cache()
            with one_at_a_time:
                append(path, record)
                print(json.dumps(record), flush=True)
                left -= "result" in record
                longest = max(longest, clock() - start)

    if len(places) == 1:
        work(places[0])
    else:
        with ThreadPoolExecutor(len(places)) as pool:
            list(pool.map(work, places))
    return left
