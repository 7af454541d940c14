"""Evaluation data from the disk, never from the network: files of records, and folders as `datasets` saves them."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_taipan.errors import UserError
from megatron_taipan.untrusted import parse_json

Record = dict[str, Any]
ENDINGS = (".json", ".jsonl", ".parquet")
SPLITS = ("validation", "test", "train")  # which one is read where several are there and none is named


def read_records(path: Path, split: str | None = None) -> list[Record]:
    """The records of a .json, .jsonl or .parquet file, or of a folder (`load_folder`).

    A .json file is a list of records, or an object that holds them under "data".

    Args:
        split: of a folder; None: validation, else test, else train.

    Raises:
        UserError: it cannot be read, or holds no records.
    """
    if path.is_dir():
        data = load_folder(path)
        name = split or next((name for name in SPLITS if name in data), next(iter(data)))
        if name not in data:
            raise UserError(f"{path} has no split {name!r}; it has {', '.join(data)}")
        records = list(data[name])
    elif path.suffix not in ENDINGS:
        raise UserError(f"{path} is neither a folder nor a file that ends in {', '.join(ENDINGS)}")
    else:
        try:
            records = _parquet(path) if path.suffix == ".parquet" else _json(path)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read: {error}") from error
    if not records or not all(isinstance(record, dict) for record in records):
        raise UserError(f"{path} holds no records: objects with named fields, one for each question or document")
    return records


def _json(path: Path) -> list[Any]:
    """The records of a JSON file."""
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".json":
            whole = parse_json(text)
            return whole.get("data", []) if isinstance(whole, dict) else whole
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; where each line is an object, its ending is .jsonl") from error
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                records.append(parse_json(line))
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not JSON: {error}") from error
    return records


def _parquet(path: Path) -> list[Record]:
    """The rows of a parquet file."""
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a parquet file: {error}") from error


@contextlib.contextmanager
def without_network() -> Iterator[None]:
    """Keeps `datasets` and `huggingface_hub` from asking the hub, whatever was set before they were imported."""
    import datasets
    import huggingface_hub.constants as hub

    before = datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, hub.HF_HUB_OFFLINE = before


def load_folder(folder: Path, configuration: str | None = None) -> dict[str, Any]:
    """The splits of a folder that `save_to_disk` wrote, or of one that `load_dataset` reads (a repository's copy, or
    files named by their split).

    Args:
        configuration: which one to read where the folder has several.

    Raises:
        UserError: there is no such folder, or `datasets` cannot read it.
    """
    import datasets

    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}")
    try:
        with without_network():
            if (folder / "dataset_dict.json").is_file():
                return dict(datasets.load_from_disk(str(folder)))
            if (folder / "state.json").is_file():
                loaded = datasets.load_from_disk(str(folder))
                return {str(loaded.split or "validation"): loaded}
            there = datasets.get_dataset_config_names(str(folder))
            name = configuration if configuration in there else None
            if name is None and len(there) > 1:
                raise UserError(f"{folder} has the configurations {', '.join(there)}, and none is {configuration!r}")
            return dict(datasets.load_dataset(os.fspath(folder.resolve()), name))
    except UserError:
        raise
    except Exception as error:  # the library raises a dozen types, of pyarrow and its own
        raise UserError(f"datasets cannot read {folder}: {' '.join(str(error).split())}") from error


def to_line(record: Record) -> str:
    """A record as a line of a .jsonl file."""
    return json.dumps(record, ensure_ascii=False) + "\n"
