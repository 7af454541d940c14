"""Reading log.jsonl, which stands in a run's folder beside its checkpoints; train/logs.py writes it."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_taipan.errors import UserError
from megatron_taipan.untrusted import parse_json

LOG = "log.jsonl"
Record = dict[str, Any]


class Course(NamedTuple):
    """A run from its first step to its last, each step once."""

    steps: list[Record]  # events "step", ascending
    valid: list[Record]  # events "valid", ascending


def read_records(log: Path, event: str | None = None) -> Iterator[Record]:
    """The records of a JSONL file in their order, all or those of one event; lines that are not JSON objects, such as
    one cut in two, are left out.

    Raises:
        OSError: it cannot be read.
    """
    word = b'"' + event.encode() + b'"' if event else b""
    with open(log, "rb") as lines:
        for line in lines:
            if word not in line:  # a log holds a line for each step
                continue
            try:
                record = parse_json(line)
            except ValueError:
                continue
            if isinstance(record, dict) and (event is None or record.get("event") == event):
                yield record


def read_course(place: Path) -> Course:
    """Training and validation of a run that may have been resumed: where it went back, what came later counts.

    A resumed or rewound run takes steps again. The records of these and of later steps that stood before, from before
    it went back, are left out, also where the run has not come that far again.

    Args:
        place: the run's folder, one of its checkpoints, or the log itself.

    Raises:
        UserError: there is no log, or it holds no step.
    """
    log = find_log(place)
    steps: list[Record] = []
    valid: list[Record] = []
    try:
        for record in read_records(log):
            step = record.get("step")
            if record.get("event") not in ("step", "valid") or not isinstance(step, int):
                continue
            if record["event"] == "step":
                _drop_from(steps, step)
                _drop_from(valid, step)
                steps.append(record)
            else:
                _drop_from(valid, step)
                valid.append(record)
    except OSError as error:
        raise UserError(f"{log} cannot be read: {error.strerror or error}") from error
    if not steps:
        raise UserError(f"{log} holds no training step; has the run taken one?")
    return Course(steps, valid)


def find_log(place: Path) -> Path:
    """The log of a run's folder, of one of its checkpoints, or the file itself.

    Raises:
        UserError: there is none.
    """
    for file in (place, place / LOG, place.parent / LOG):
        if file.is_file():
            return file
    raise UserError(f"{place} is not a run's folder: there is no {LOG} in it or beside it")


def _drop_from(records: list[Record], step: int) -> None:
    """Removes the records of `step` and of later ones, which are at the end."""
    while records and records[-1]["step"] >= step:
        records.pop()


def records_backwards(path: Path) -> Iterator[Record]:
    """The records of a JSONL file, last one first; lines that are not JSON are left out."""
    try:
        file = open(path, "rb")
    except OSError:
        return
    with file:
        end, rest = file.seek(0, os.SEEK_END), b""
        while end > 0:
            start = max(end - (1 << 16), 0)
            file.seek(start)
            first, *lines = (file.read(end - start) + rest).split(b"\n")
            end, rest = start, first
            for line in reversed(lines if start else [first, *lines]):
                try:
                    yield parse_json(line)
                except ValueError:
                    continue
