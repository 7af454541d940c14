"""Sources that cannot be read twice or in the middle (stdin, a hub's stream) are first written to one .jsonl file."""

import json
import os
import shutil
import sys
from itertools import count

import orjson

from megatron_taipan.errors import UserError

HUB = "hub:"


def is_stream(name: str) -> bool:
    """`-` is stdin; `hub:NAME`, `hub:NAME:CONFIG` or `hub:NAME:CONFIG:SPLIT` a dataset on the Hugging Face hub."""
    return name == "-" or name.startswith(HUB)


def cache_stream(name: str, folder: str) -> str:
    """Writes a stream to a file, whole or not at all, and returns its path; an earlier run's whole file of a hub
    dataset is taken over, stdin is always read again."""
    os.makedirs(folder, exist_ok=True)
    path = os.path.join(folder, ("stdin" if name == "-" else name.replace("/", "--").replace(":", "__")) + ".jsonl")
    if name != "-" and os.path.exists(path):
        return path
    with open(path + ".partial", "wb") as file:
        if name == "-":
            shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
        else:
            records = iter(_hub(name))
            for number in count():
                try:
                    record = next(records)
                except StopIteration:
                    break
                except Exception as error:  # any error of the network
                    raise UserError(
                        f"{name} broke off after {number} records: {_line(error)}; the same command streams it again"
                    ) from error
                file.write(_packed(record) + b"\n")
    os.replace(path + ".partial", path)
    return path


def _hub(name: str):
    """The records of a hub dataset, streamed."""
    parts = name.removeprefix(HUB).split(":")
    try:
        from datasets import load_dataset

        config = parts[1] or None if len(parts) > 1 else None
        split = parts[2] if len(parts) > 2 else "train"
        return load_dataset(parts[0], config, split=split, streaming=True)
    except ImportError as error:
        raise UserError(f"{name}: streaming from the hub takes the package datasets; `pip install datasets`") from error
    except Exception as error:  # any error of the network or the hub
        raise UserError(f"{name} cannot be streamed: {_line(error)}") from error


def _packed(record: object) -> bytes:
    """One line of JSON; what orjson does not write (half a surrogate pair, a large integer, a key that is a number) is
    written as Python's library does."""
    try:
        return orjson.dumps(record, default=str)
    except TypeError:
        return json.dumps(record, default=str).encode()


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
