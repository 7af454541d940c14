"""What an evaluation task leaves in the folder of its `--out`: TASK.json, TASK.md, and its pictures TASK*.svg."""

import json
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

import megatron_taipan
from megatron_taipan.checkpoint.files import write_text
from megatron_taipan.errors import writing

Row = dict[str, Any]  # column to value; None where there is none


def markdown_table(rows: list[Row]) -> str:
    """Rows with the same columns as a Markdown table; floats with four significant digits."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([cell_text(row[c]) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell_text(value: Any) -> str:
    """A table's cell."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def make_folder(folder: Path | None) -> None:
    """Makes the folder of `--out`, if one is given, before the work rather than after it.

    Raises:
        UserError: it cannot be made.
    """
    if folder is not None:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)


def write_results(folder: Path, task: str, rows: list[Row], *, about: dict[str, Any], title: str) -> None:
    """Writes TASK.json ({"task", "title", "made", "about", "rows"}) and TASK.md (the same as a table).

    Args:
        about: everything that the numbers depend on besides the rows and what `made_by` says: options, data, device.

    Raises:
        UserError: the folder cannot be written.
    """
    record = {"task": task, "title": title, "made": made_by(), "about": about, "rows": rows}
    told = "\n".join(f"- {name}: {value}" for name, value in (about | made_by()).items())
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / f"{task}.json", json.dumps(record, indent=1) + "\n")
        write_text(folder / f"{task}.md", f"# {title}\n\n{markdown_table(rows)}\n\n{told}\n")


def describe_options(options: Namespace) -> dict[str, str]:
    """A task's options as words for `about`; the items of a list are separated by blanks, as on a command line."""
    return {
        name: " ".join(map(str, value)) if isinstance(value, list) else str(value)
        for name, value in vars(options).items()
    }


def made_by() -> dict[str, str]:
    """The day and the versions of a result."""
    return {
        "date": time.strftime("%Y-%m-%d"), "megatron_taipan": megatron_taipan.__version__, "torch": torch.__version__,
    }  # fmt: skip
