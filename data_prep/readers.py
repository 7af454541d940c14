"""Documents of a slice of a file, and the records that give none."""

import os
from collections.abc import Iterator
from dataclasses import replace

from data_prep.extract import Extract
from data_prep.kinds.records import QUARANTINED_BYTES, UNREADABLE, Reading, Record, Slice, unreadable
from data_prep.kinds.registry import input_kind, known_endings
from data_prep.limits import DEFAULT_LIMITS, Limits, too_large
from data_prep.long_text import BrokenText
from data_prep.packages import require
from megatron_taipan.errors import UserError


def read_records(
    span: Slice, extract: Extract, scratch: str | None = None, limits: Limits = DEFAULT_LIMITS
) -> Iterator[Record]:
    """The records of one slice in order. Unreadable files end in a record with a problem, never in silence.

    Args:
        scratch, limits: as in `Reading`.

    Raises:
        UserError: the file is of no known kind, or a package that reads it is missing.
    """
    kind = input_kind(span.path)
    if kind is None:
        raise UserError(f"{span.path} is of no known kind; known are {known_endings()}")
    if kind.needs:
        require(kind.needs, f"{span.path}: reading it")
    try:
        for record in kind.read(span, Reading(extract, scratch, limits)):
            yield _within(record, limits.record)
    except UNREADABLE as error:
        yield Record(span.path, problem=unreadable(error))


def _within(record: Record, limit: int) -> Record:
    """The record, or a problem where its text has more bytes; of one in chunks that shows when they are used."""
    if record.size > limit:
        return Record(record.where, problem=too_large(limit), raw=record.raw[:QUARANTINED_BYTES])
    return record if record.chunks is None else replace(record, chunks=_until(record.chunks, limit))


def _until(chunks: Iterator[str], limit: int) -> Iterator[str]:
    size = 0
    for chunk in chunks:
        size += len(chunk) if chunk.isascii() else len(chunk.encode(errors="replace"))
        if size > limit:
            raise BrokenText(too_large(limit))
        yield chunk


def size_of(path: str) -> int:
    """Bytes of a file; 1 where that is not known, so that reading it is tried and says why."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 1
