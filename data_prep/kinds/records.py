"""What a kind of input is, and what its reader takes and gives.

A document of more than LONG bytes is never held as a whole (but where a table holds it so): its record gives chunks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from data_prep import tolerant
from data_prep.extract import Extract, Marked
from data_prep.limits import DEFAULT_LIMITS, Limits
from data_prep.long_text import READ_BYTES
from data_prep.packed import Damaged, TooWide, garbage, is_packed, open_packed

BUFFER_BYTES = 1 << 20
LONG = 4 << 20  # bytes of a document, or of a line of JSON, from which on it is read in chunks
QUARANTINED_BYTES = 1 << 20  # bytes of a long record without a document that go to quarantine
UNREADABLE = (EOFError, Damaged, TooWide, OSError)


@dataclass(frozen=True)
class Slice:
    """Bytes [start, stop) of one file; of a file that cannot be cut, all of it."""

    path: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Record:
    """One document: `text`, or `chunks` of it, to be used before the next record is asked for, which may raise
    BrokenText. Or one record that gives none: `problem` says why, `raw` is what was there."""

    where: str
    text: str = ""
    size: int = 0  # bytes of `text` in UTF-8
    problem: str = ""
    raw: bytes = b""
    chunks: Iterator[str] | None = None
    borders: tuple[int, ...] = ()  # of `text`, as in Marked; empty where nothing is marked


@dataclass(frozen=True)
class Reading:
    """How a file is read.

    Attributes:
        extract: the text of a record; raises ValueError where there is none.
        scratch: folder for what a long line of JSON is decoded into; None: the system's.
        limits: a larger record gives a problem, a file that needs a larger window too.
    """

    extract: Extract
    scratch: str | None = None
    limits: Limits = DEFAULT_LIMITS


@dataclass(frozen=True)
class InputKind:
    """A kind of input files.

    Attributes:
        name: for messages.
        endings: of the files' names, in lower case, without that of a compression.
        read: the records of one slice, in order. It may raise UNREADABLE: what came before counts.
        splittable: slices may begin anywhere in a file: `read` gives the records of which the first byte is within
            [start, stop). Others get one slice, the whole file; so do compressed files.
        compressible: files may be compressed too; `read` opens them with `open_file`.
        needs: package that reading takes, besides those of every installation.
    """

    name: str
    endings: tuple[str, ...]
    read: Callable[[Slice, Reading], Iterator[Record]]
    splittable: bool = False
    compressible: bool = True
    needs: str = ""


def open_file(path: str, limits: Limits):
    """The (decompressed) bytes of a file as a buffered stream."""
    return open_packed(path, limits.window) if is_packed(path) else open(path, "rb", buffering=BUFFER_BYTES)


def garbage_record(path: str, file) -> Iterator[Record]:
    """A record about what follows the content of a file, which has been read to its end; none where nothing does."""
    if found := garbage(file):
        yield Record(path, problem=f"garbage behind compressed data that is whole: {found}")


def document(where: str, found: str | Marked, raw: bytes) -> Record:
    """The record of an extracted text, or why it gives none."""
    text, borders = (found.text, found.borders) if isinstance(found, Marked) else (found, ())
    if not text:
        return Record(where, problem="empty document", raw=raw)
    if len(text) > LONG:
        if borders:
            return too_long(where, raw[:QUARANTINED_BYTES])
        pieces = (text[at : at + READ_BYTES] for at in range(0, len(text), READ_BYTES))
        return Record(where, raw=raw[:QUARANTINED_BYTES], chunks=pieces)
    if text.isascii():
        return Record(where, text, len(text), borders=borders)
    try:
        return Record(where, text, len(text.encode()), borders=borders)
    except UnicodeEncodeError as error:
        return Record(where, problem=tolerant.no_text(error), raw=raw)


def too_long(where: str, raw: bytes) -> Record:
    """Windows know nothing of parts that are learned."""
    return Record(where, problem=f"document too long: one with learned parts has at most {LONG} characters", raw=raw)


def unreadable(error: Exception) -> str:
    """Why a file cannot be read (to its end)."""
    if isinstance(error, EOFError):
        return "file ends before its compressed data does"
    if isinstance(error, Damaged):
        return f"damaged compressed data: {error}"
    if isinstance(error, TooWide):
        return f"window too large: {error}"
    return "cannot be read: " + " ".join(str(getattr(error, "strerror", None) or error).split())  # arrow's have lines
