"""Files that somebody else may have written: read as data, and never a way to other files."""

import json
from typing import Any

LONGEST_NAME = 255  # bytes, as file systems have it


def plain_name(name: object) -> bool:
    """Whether something read from a file is the name of a file beside it, and not a path to another place."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
        return False
    try:
        return len(name.encode()) <= LONGEST_NAME
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold
        return False


def parse_json(raw: bytes | str) -> Any:
    """As `json.loads`.

    Raises:
        ValueError: it is not JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(raw)
    except RecursionError as error:
        raise ValueError("too deeply nested") from error
