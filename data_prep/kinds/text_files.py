"""Plain text: a file is one document."""

from collections.abc import Iterator

from data_prep.kinds import records
from data_prep.kinds.records import UNREADABLE, InputKind, Reading, Record, Slice, document, garbage_record, unreadable
from data_prep.long_text import BrokenText, blocks_of, decoded


def _text(span: Slice, reading: Reading) -> Iterator[Record]:
    """A text file is one document."""
    with records.open_file(span.path, reading.limits) as file:
        data = file.read(records.LONG)
        if len(data) == records.LONG:
            chunks = _guarded(decoded(blocks_of(data, file), "utf-8-sig"))
            yield Record(span.path, raw=data[: records.QUARANTINED_BYTES], chunks=chunks)
        else:
            try:
                yield document(span.path, data.decode("utf-8-sig"), data)
            except UnicodeDecodeError as error:
                yield Record(span.path, problem=f"invalid UTF-8 at byte {error.start}", raw=data)
        yield from garbage_record(span.path, file)


def _guarded(chunks: Iterator[str]) -> Iterator[str]:
    """The chunks; what goes wrong with the file on the way is a BrokenText."""
    try:
        yield from chunks
    except UNREADABLE as error:
        raise BrokenText(unreadable(error)) from error


TEXT_FILES = InputKind("one document", (".txt",), _text)
