"""Many short runs, kept in one file of JSON lines: made in as many calls as it takes, none twice.

A line is {"run": what was asked for, "result": what came of it} or, where it failed, {"run": ..., "error": ...}. A
later line of the same run stands for the earlier one.
"""

import gc
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch


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
    run: Callable[[dict], dict],
    minutes: float | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Makes the runs that the file has no result of, one after the other; one that failed before is tried again.

    Args:
        minutes: no run starts that would end later, if it takes as long as the longest of this call so far.
        clock: seconds.

    Returns:
        Number of runs that still have no result.
    """
    done = {key for key, record in read(path).items() if "result" in record}
    waiting = [what for what in wanted if key_of(what) not in done]
    began, longest, left = clock(), 0.0, len(waiting)
    for what in waiting:
        start = clock()
        if minutes is not None and start - began + longest > 60 * minutes:
            break
        try:
            record: dict = {"run": what, "result": run(what)}
            left -= 1
        except Exception as error:  # the others do not depend on it
            traceback.print_exc()
            record = {"run": what, "error": f"{type(error).__name__}: {str(error)[:300]}"}
        append(path, record)
        print(json.dumps(record), flush=True)
        gc.collect()  # a failed run's memory is held by its traceback until here
        torch.cuda.empty_cache()
        longest = max(longest, clock() - start)
    return left
