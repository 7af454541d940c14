"""What a task leaves: an evaluation's table, or the numbers in the last line that a command prints."""

import json
import math
import os
from pathlib import Path
from typing import Any

from megatron_taipan.errors import UserError
from megatron_taipan.task_config import TaskConfig
from megatron_taipan.untrusted import parse_json

# columns of evaluations' tables that say what a row is about; the other floats are its results, integers its counts
LABELS = ("kind", "data", "task", "distance", "length", "context", "depth", "pairs")
LONGEST_TABLE = 4 << 20  # bytes
LONGEST_LINE = 1 << 16  # bytes


def read_results(task: TaskConfig, out: Path, stdout: Path) -> dict[str, Any]:
    """{"rows": [...]} of an evaluation, {"values": {name: number}} of a command, {} of one that prints none.

    Raises:
        UserError: what is there is something else.
        OSError: it cannot be read.
    """
    if task.evaluation is not None:
        return {"rows": finite(_read_rows(out / f"{task.evaluation}.json"))}
    values = _last_numbers(stdout)
    return {} if values is None else {"values": finite(values)}


def curves(results: dict[str, Any]) -> dict[str, float]:
    """The numbers that boards draw, by name: of a row `length 1024/perplexity`, of a command as it calls them."""
    found = {name: value for name, value in results.get("values", {}).items() if value is not None}
    for row in results.get("rows", []):
        about = [value if isinstance(value, str) else f"{name} {value:g}" for name, value in _labels(row)]
        for name, value in row.items():
            if isinstance(value, float) and name not in LABELS:
                found["/".join([*about, name])] = value
    return found


def _labels(row: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, row[name]) for name in LABELS if isinstance(row.get(name), str | int | float)]


def finite(value: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_rows(file: Path) -> list[dict[str, Any]]:
    if not file.is_file():
        raise UserError(f"it ended well but wrote no {file.name}")
    if (size := file.stat().st_size) > LONGEST_TABLE:
        raise UserError(f"its {file.name} has {size:,} bytes, more than a table of results ({LONGEST_TABLE:,})")
    try:
        rows = parse_json(file.read_bytes())["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"its {file.name} is not a table of results ({type(error).__name__}: {error})") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"its {file.name} has rows that are not a list of rows")
    return rows


def _last_numbers(stdout: Path) -> dict[str, float] | None:
    """The last line's object of numbers; None where the last line is not meant to be one."""
    with open(stdout, "rb") as file:
        begin = file.seek(max(file.seek(0, os.SEEK_END) - LONGEST_LINE, 0))
        lines = file.read().split(b"\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), b"")
    if begin and last == lines[0].strip() and last.endswith(b"}"):  # its beginning was not read
        raise UserError(f"its last line has more than {LONGEST_LINE:,} bytes, too many for an object of numbers")
    if not last.startswith(b"{"):
        return None
    try:
        values = parse_json(last)
    except ValueError as error:
        raise UserError(f"its last line begins with {{ and is not JSON ({error})") from error
    wrong = {name: value for name, value in values.items() if not _is_number(value)}
    if wrong:
        raise UserError(f"its last line has values that are not numbers: {json.dumps(wrong)[:200]}")
    if unwritable := [name for name in values if not _is_text(name)]:
        raise UserError(f"its last line has a name that no board can write: {json.dumps(unwritable[0])[:200]}")
    return values


def _is_text(name: str) -> bool:
    """Whether it can be encoded: JSON can hold half a surrogate pair."""
    return name == name.encode(errors="replace").decode()


def _is_number(value: Any) -> bool:
    return isinstance(value, float) or (type(value) is int and abs(value) < 1e300)  # boards take what a float holds
