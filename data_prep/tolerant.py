"""JSON as programs write it: with NaN and Infinity, halves of surrogate pairs, bytes that are not UTF-8.

A record is lost only where its text is none, not for the sake of a field beside it. So what cannot be in a text is
parsed too, into lone surrogates, which no text has: `no_text` says what they mean when encoding a text met them.
"""

import json
from typing import Any

import orjson

# Raw control characters in a string, which JSON forbids; the tab and what ends a line say what they mean.
FORBIDDEN = {code: 0xDC00 + code for code in range(0x20) if code not in b"\t\n\r"}
BYTES = 0xDC80  # and above: bytes that are not UTF-8, as Python's surrogateescape has them
LONGEST_NUMBER = 4300  # digits that Python turns into an int


def parsed(line: bytes) -> Any:
    """The value of one line.

    Raises:
        ValueError: it is not JSON; the message says why.
    """
    try:
        return loads(line)
    except ValueError as error:
        raise ValueError(f"broken JSON: {error}") from error


def loads(raw: bytes) -> Any:
    """As `orjson.loads`, where that gives up for reasons that need not concern the text, as `json.loads`.

    Raises:
        ValueError: it is not JSON in the eyes of either.
    """
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        text = raw.decode("utf-8", "surrogateescape").translate(FORBIDDEN)
        try:
            return json.loads(text, strict=False, parse_int=_number)
        except RecursionError:
            raise ValueError("too deeply nested") from error


def no_text(error: UnicodeEncodeError, before: int = 0) -> str:
    """Why a string that was parsed here cannot be encoded; so many characters of the text came before it."""
    code, place = ord(error.object[error.start]), f"at character {before + error.start}"
    if 0xDC00 + 0x20 > code >= 0xDC00:
        return f"broken JSON: control character \\x{code - 0xDC00:02x} {place} of the text"
    if BYTES + 0x80 > code >= BYTES:
        return f"invalid UTF-8: byte \\x{code - 0xDC00:02x} {place} of the text"
    return f"invalid UTF-8: lone surrogate {place} of the text"


def _number(digits: str) -> int | float:
    return int(digits) if len(digits) <= LONGEST_NUMBER else float(digits)
