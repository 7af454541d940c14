"""JSON: a record a line; a .json may also be one array of records, or one record."""

import json
from collections.abc import Iterator

from data_prep import tolerant
from data_prep.extract import Extract, Marked
from data_prep.kinds import records
from data_prep.kinds.records import InputKind, Reading, Record, Slice, document, garbage_record, too_long
from data_prep.limits import Limits
from data_prep.long_text import LongLine
from data_prep.packed import is_packed

BOM = b"\xef\xbb\xbf"  # some programs begin a file with it
ARRAY = 64 << 20  # bytes of a file that is one JSON value, at most: it is held as a whole


def _json(span: Slice, reading: Reading) -> Iterator[Record]:
    """A file that is lines, or one value: then all of it belongs to the first slice."""
    if not _is_one_value(span.path, reading.limits):
        yield from _lines(span, reading)
    elif not span.start:
        yield from _entries(span.path, reading)


def _lines(span: Slice, reading: Reading) -> Iterator[Record]:
    """JSON lines. A line belongs to the slice that holds its first byte."""
    whole, extract = is_packed(span.path), reading.extract
    with records.open_file(span.path, reading.limits) as file:
        at = span.start
        if at and not whole:
            file.seek(at - 1)
            at -= 1
            while at < span.stop and (rest := file.readline(records.READ_BYTES)):
                at += len(rest)
                if rest.endswith(b"\n"):
                    break
        while whole or at < span.stop:
            line = file.readline(records.LONG)
            if not line:
                break
            where, size = f"{span.path}:byte {at}", len(line)
            if not at and line.startswith(BOM):
                line, where = line[3:], f"{span.path}:byte 3"
            if size == records.LONG and not line.endswith(b"\n"):
                long = LongLine(line, file, reading.scratch, reading.limits.record)
                size += long.size - len(line)
                if long.skeleton is None or not long.skeleton.isspace():
                    yield _parse_long(where, line, long, extract)
            elif not line.isspace():
                yield _parse(where, line, extract)
            at += size
        yield from garbage_record(span.path, file)


def _parse(where: str, line: bytes, extract: Extract) -> Record:
    """One line of JSON."""
    try:
        return document(where, extract(tolerant.parsed(line)), line)
    except ValueError as error:
        return Record(where, problem=str(error), raw=line)


def _parse_long(where: str, first: bytes, line: LongLine, extract: Extract) -> Record:
    """One line of JSON that is too long to hold; `first` is its beginning."""
    raw = first[: records.QUARANTINED_BYTES]
    if line.skeleton is None:
        return Record(where, problem=line.problem, raw=raw)
    try:
        text = extract(tolerant.parsed(line.skeleton))
    except ValueError as error:
        return Record(where, problem=str(error), raw=raw)
    if fault := line.fault(text.text if isinstance(text, Marked) else text):
        return Record(where, problem=fault, raw=raw)
    if isinstance(text, Marked):
        return too_long(where, raw) if line.marked(text.text) else document(where, text, raw)
    if line.marked(text):
        return Record(where, raw=raw, chunks=line.chunks(text))
    return document(where, text, raw)


def _is_one_value(path: str, limits: Limits) -> bool:
    """Whether a .json file is one array, or one record over several lines (the second begins with a name), and not
    lines."""
    with records.open_file(path, limits) as file:
        lines = (line for line in iter(lambda: file.readline(records.READ_BYTES), b"") if line.strip())
        first, second = next(lines, b"").removeprefix(BOM), next(lines, b"")
    if first.lstrip().startswith(b"["):
        return True
    goes_on = first.endswith(b"\n") and first.strip().endswith((b"{", b"[", b","))
    return goes_on and second.lstrip().startswith(b'"')


def _entries(path: str, reading: Reading) -> Iterator[Record]:
    """The entries of a file that is one array of JSON, or one record."""
    with records.open_file(path, reading.limits) as file:
        data = file.read(ARRAY + 1)
        if len(data) > ARRAY:
            problem = f"array too large: one JSON value of over {ARRAY} bytes; make a line of each entry: jq -c '.[]'"
            yield Record(path, problem=problem, raw=data[: records.QUARANTINED_BYTES])
            return
        rest = list(garbage_record(path, file))
    try:
        value = tolerant.parsed(data.removeprefix(BOM))
    except ValueError as error:
        yield Record(path, problem=f"{error} (in a file that is not JSON lines)", raw=data[: records.QUARANTINED_BYTES])
        return
    for number, entry in enumerate(value if isinstance(value, list) else [value]):
        where = f"{path}:entry {number}"
        try:
            yield document(where, reading.extract(entry), b"")
        except ValueError as error:
            yield Record(where, problem=str(error), raw=json.dumps(entry).encode())
    yield from rest


JSON_LINES = InputKind("JSON lines", (".jsonl", ".ndjson", ".jsonlines"), _lines, splittable=True)
JSON = InputKind("JSON lines, or one array or record of up to 64 MB", (".json",), _json, splittable=True)
