"""Files that somebody else may have written: read as data, and never a way to other files."""

import json
from typing import Any


def plain_name(name: object) -> bool:
    """Whether something that stands in a file is the name of a file beside it, and no path to another place."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def parse_json(raw: bytes | str) -> Any:
    """As `json.loads`.

    Raises:
        ValueError: it is no JSON, or nested too deeply to be read.
    """
    try:
        return json.loads(raw)
    except RecursionError as error:
        raise ValueError("too deeply nested") from error
