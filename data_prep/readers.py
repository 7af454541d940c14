"""Documents of a slice of a file, and the records that are none.

A document of more than LONG bytes is never held as a whole (but where a table holds it so): its record gives chunks.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

from data_prep import tables, tolerant
from data_prep.extract import Extract, Marked
from data_prep.inputs import Slice
from data_prep.kinds import COMPRESSED, SPLITTABLE, TABLES, TEXTS, is_json, kind_of
from data_prep.limits import USUAL, Limits, too_large
from data_prep.long_text import BLOCK, BrokenText, LongLine, blocks_of, decoded
from data_prep.packed import Damaged, TooWide, garbage, open_packed

BUFFER = 1 << 20
BOM = b"\xef\xbb\xbf"  # some programs begin a file with it
LONG = 4 << 20  # bytes of a document, or of a line of JSON, from which on it is read in chunks
ARRAY = 64 << 20  # bytes of a file that is one JSON value, at most: it is held as a whole
KEPT = 1 << 20  # bytes of a long record without a document that go to quarantine


@dataclass(frozen=True, slots=True)
class Record:
    """One document: `text`, or `chunks` of it, to be used before the next record is asked for, which may raise
    BrokenText. Or one record that gives none: `problem` says why, `raw` is what stood there."""

    where: str
    text: str = ""
    size: int = 0  # bytes of `text` in UTF-8
    problem: str = ""
    raw: bytes = b""
    chunks: Iterator[str] | None = None
    borders: tuple[int, ...] = ()  # of `text`, as in Marked; empty where nothing is marked


def read(piece: Slice, extract: Extract, scratch: str | None = None, limits: Limits = USUAL) -> Iterator[Record]:
    """The records of one slice in order. Unreadable files end in a record with a problem, never in silence.

    Args:
        scratch: folder for what a long line of JSON is decoded into; None: the system's.
        limits: a larger record gives a problem, a file that needs a larger window too.
    """
    try:
        for record in _records(piece, extract, scratch, limits):
            yield _within(record, limits.record)
    except UNREADABLE as error:
        yield Record(piece.path, problem=_unreadable(error))


def _records(piece: Slice, extract: Extract, scratch: str | None, limits: Limits) -> Iterator[Record]:
    kind = kind_of(piece.path) or ""
    if kind in TABLES:
        yield from _table(piece, extract)
    elif kind.startswith(TEXTS):
        yield from _text(piece, limits)
    elif is_json(kind) and _one_value(piece.path, limits):
        if not piece.start:
            yield from _entries(piece.path, extract, limits)
    else:
        yield from _lines(piece, extract, scratch, limits)


def _within(record: Record, limit: int) -> Record:
    """The record, or a problem where its text has more bytes; of one in chunks that shows when they are used."""
    if record.size > limit:
        return Record(record.where, problem=too_large(limit), raw=record.raw[:KEPT])
    return record if record.chunks is None else replace(record, chunks=_until(record.chunks, limit))


def _until(chunks: Iterator[str], limit: int) -> Iterator[str]:
    size = 0
    for chunk in chunks:
        size += len(chunk) if chunk.isascii() else len(chunk.encode(errors="replace"))
        if size > limit:
            raise BrokenText(too_large(limit))
        yield chunk


UNREADABLE = (EOFError, Damaged, TooWide, OSError)


def _unreadable(error: Exception) -> str:
    """Why a file cannot be read (to its end)."""
    if isinstance(error, EOFError):
        return "file ends before its compressed data does"
    if isinstance(error, Damaged):
        return f"damaged compressed data: {error}"
    if isinstance(error, TooWide):
        return f"window too large: {error}"
    return "cannot be read: " + " ".join(str(getattr(error, "strerror", None) or error).split())  # arrow's have lines


def _open(path: str, limits: Limits):
    """The (decompressed) bytes of a file as a buffered stream."""
    if path.lower().endswith(COMPRESSED):
        return open_packed(path, limits.window)
    return open(path, "rb", buffering=BUFFER)


def _rest(path: str, file) -> Iterator[Record]:
    """A record that tells of what stands behind the content of a file, which has been read to its end."""
    if found := garbage(file):
        yield Record(path, problem=f"garbage behind compressed data that is whole: {found}")


def _lines(piece: Slice, extract: Extract, scratch: str | None, limits: Limits) -> Iterator[Record]:
    """JSON lines. A line belongs to the slice in which its first byte lies."""
    whole = kind_of(piece.path) not in SPLITTABLE
    with _open(piece.path, limits) as file:
        at = piece.start
        if at and not whole:
            file.seek(at - 1)
            at -= 1
            while at < piece.stop and (rest := file.readline(BLOCK)):
                at += len(rest)
                if rest.endswith(b"\n"):
                    break
        while whole or at < piece.stop:
            line = file.readline(LONG)
            if not line:
                break
            where, size = f"{piece.path}:byte {at}", len(line)
            if not at and line.startswith(BOM):
                line, where = line[3:], f"{piece.path}:byte 3"
            if size == LONG and not line.endswith(b"\n"):
                long = LongLine(line, file, scratch, limits.record)
                size += long.size - len(line)
                if long.skeleton is None or not long.skeleton.isspace():
                    yield _parse_long(where, line, long, extract)
            elif not line.isspace():
                yield _parse(where, line, extract)
            at += size
        yield from _rest(piece.path, file)


def _parse(where: str, line: bytes, extract: Extract) -> Record:
    """One line of JSON."""
    try:
        return _document(where, extract(tolerant.parsed(line)), line)
    except ValueError as error:
        return Record(where, problem=str(error), raw=line)


def _parse_long(where: str, first: bytes, line: LongLine, extract: Extract) -> Record:
    """One line of JSON that is too long to hold; `first` is its beginning."""
    raw = first[:KEPT]
    if line.skeleton is None:
        return Record(where, problem=line.problem, raw=raw)
    try:
        text = extract(tolerant.parsed(line.skeleton))
    except ValueError as error:
        return Record(where, problem=str(error), raw=raw)
    if fault := line.fault(text.text if isinstance(text, Marked) else text):
        return Record(where, problem=fault, raw=raw)
    if isinstance(text, Marked):
        return _too_long(where, raw) if line.marked(text.text) else _document(where, text, raw)
    if line.marked(text):
        return Record(where, raw=raw, chunks=line.chunks(text))
    return _document(where, text, raw)


def _one_value(path: str, limits: Limits) -> bool:
    """Whether a .json file is one array, or one record over several lines (the second begins with a name), and not
    lines."""
    with _open(path, limits) as file:
        lines = (line for line in iter(lambda: file.readline(BLOCK), b"") if line.strip())
        first, second = next(lines, b"").removeprefix(BOM), next(lines, b"")
    if first.lstrip().startswith(b"["):
        return True
    goes_on = first.endswith(b"\n") and first.strip().endswith((b"{", b"[", b","))
    return goes_on and second.lstrip().startswith(b'"')


def _entries(path: str, extract: Extract, limits: Limits) -> Iterator[Record]:
    """The entries of a file that is one array of JSON, or one record."""
    with _open(path, limits) as file:
        data = file.read(ARRAY + 1)
        if len(data) > ARRAY:
            problem = f"array too large: one JSON value of over {ARRAY} bytes; make a line of each entry: jq -c '.[]'"
            yield Record(path, problem=problem, raw=data[:KEPT])
            return
        rest = list(_rest(path, file))
    try:
        value = tolerant.parsed(data.removeprefix(BOM))
    except ValueError as error:
        yield Record(path, problem=f"{error} (in a file that is no JSON lines)", raw=data[:KEPT])
        return
    for number, entry in enumerate(value if isinstance(value, list) else [value]):
        where = f"{path}:entry {number}"
        try:
            yield _document(where, extract(entry), b"")
        except ValueError as error:
            yield Record(where, problem=str(error), raw=json.dumps(entry).encode())
    yield from rest


def _text(piece: Slice, limits: Limits) -> Iterator[Record]:
    """A text file is one document."""
    with _open(piece.path, limits) as file:
        data = file.read(LONG)
        if len(data) == LONG:
            chunks = _guarded(decoded(blocks_of(data, file), "utf-8-sig"))
            yield Record(piece.path, raw=data[:KEPT], chunks=chunks)
        else:
            try:
                yield _document(piece.path, data.decode("utf-8-sig"), data)
            except UnicodeDecodeError as error:
                yield Record(piece.path, problem=f"invalid UTF-8 at byte {error.start}", raw=data)
        yield from _rest(piece.path, file)


def _guarded(chunks: Iterator[str]) -> Iterator[str]:
    """The chunks; what goes wrong with the file on the way is a BrokenText."""
    try:
        yield from chunks
    except UNREADABLE as error:
        raise BrokenText(_unreadable(error)) from error


def _table(piece: Slice, extract: Extract) -> Iterator[Record]:
    """The rows of a table; of each the fields that the text is made of."""
    for where, row, problem in tables.rows(piece.path, extract.fields):
        if problem:
            yield Record(where, problem=problem)
            continue
        try:
            yield _document(where, extract(row), b"")
        except ValueError as error:
            yield Record(where, problem=tables.fault(row) or str(error), raw=tables.as_json(row))


def _document(where: str, found: str | Marked, raw: bytes) -> Record:
    text, borders = (found.text, found.borders) if isinstance(found, Marked) else (found, ())
    if not text:
        return Record(where, problem="empty document", raw=raw)
    if len(text) > LONG:
        if borders:
            return _too_long(where, raw[:KEPT])
        pieces = (text[at : at + BLOCK] for at in range(0, len(text), BLOCK))
        return Record(where, raw=raw[:KEPT], chunks=pieces)
    if text.isascii():
        return Record(where, text, len(text), borders=borders)
    try:
        return Record(where, text, len(text.encode()), borders=borders)
    except UnicodeEncodeError as error:
        return Record(where, problem=tolerant.no_text(error), raw=raw)


def _too_long(where: str, raw: bytes) -> Record:
    """Windows know nothing of parts that are learned."""
    return Record(where, problem=f"document too long: one with learned parts has at most {LONG} characters", raw=raw)


def size_of(path: str) -> int:
    """Bytes of a file; 1 where that cannot be told, so that reading it is tried and says why."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 1
