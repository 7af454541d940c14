"""Documents of a slice of a file, and the records that are none."""

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import orjson

from data_prep.extract import Extract
from data_prep.inputs import Slice, kind_of
from megatron_taipan.errors import UserError

try:
    from isal import igzip as gzip  # reads gzip three times faster
    from isal.igzip import BadGzipFile
except ImportError:
    import gzip  # type: ignore[no-redef]
    from gzip import BadGzipFile

BUFFER = 1 << 20
TABLE_ROWS = 256  # rows of a table turned into Python objects at a time


@dataclass(frozen=True, slots=True)
class Record:
    """One document (`text`), or one record that gives none (`problem` says why, `raw` is what stood there)."""

    where: str
    text: str = ""
    problem: str = ""
    raw: bytes = b""


def read(piece: Slice, extract: Extract) -> Iterator[Record]:
    """The records of one slice in order. Unreadable files end in a record with a problem, never in silence."""
    kind = kind_of(piece.path)
    try:
        if kind in (".parquet", ".arrow"):
            yield from _table(piece, extract)
        elif kind.startswith(".txt"):
            yield from _text(piece)
        else:
            yield from _lines(piece, extract)
    except EOFError:
        yield Record(piece.path, problem="file ends before its compressed data does")
    except (BadGzipFile, zlib.error) as error:
        yield Record(piece.path, problem=f"damaged compressed data: {error}")
    except OSError as error:
        yield Record(piece.path, problem=f"cannot be read: {error.strerror or error}")


def _open(path: str):
    """The (decompressed) bytes of a file as a buffered stream."""
    if path.lower().endswith(".gz"):
        return gzip.open(path, "rb")
    if path.lower().endswith(".zst"):
        return _zstd(path)
    return open(path, "rb", buffering=BUFFER)


def _zstd(path: str):
    import io

    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path}: reading .zst takes the package zstandard; `pip install zstandard`") from error

    class Checked(io.RawIOBase):
        """A zstandard stream that does not take a file cut in the middle for its end."""

        def __init__(self):
            self.file = open(path, "rb")
            self.left, self.out = b"", b""
            self.frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            self.started = False

        def readable(self):
            return True

        def readinto(self, buffer):
            while not self.out:
                data = self.left or self.file.read(BUFFER // 4)
                self.left = b""
                if not data:
                    if self.started:
                        raise EOFError
                    return 0
                try:
                    self.out = self.frame.decompress(data)
                except zstandard.ZstdError as error:
                    raise BadGzipFile(error) from error
                self.started = True
                if self.frame.eof:
                    self.left, self.started = self.frame.unused_data, False
                    self.frame = zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            count = min(len(buffer), len(self.out))
            buffer[:count] = self.out[:count]
            self.out = self.out[count:]
            return count

    return io.BufferedReader(Checked(), BUFFER)


def _lines(piece: Slice, extract: Extract) -> Iterator[Record]:
    """JSON lines. A line belongs to the slice in which its first byte lies."""
    whole = kind_of(piece.path) != ".jsonl"
    with _open(piece.path) as file:
        at = piece.start
        if at and not whole:
            file.seek(at - 1)
            at += len(file.readline()) - 1
        while whole or at < piece.stop:
            line = file.readline()
            if not line:
                break
            if not at and line.startswith(b"\xef\xbb\xbf"):
                line = line[3:]
                at += 3
            if not line.isspace():
                yield _parse(f"{piece.path}:byte {at}", line, extract)
            at += len(line)


def _parse(where: str, line: bytes, extract: Extract) -> Record:
    """One line of JSON. orjson also refuses lone surrogates and bytes that are no UTF-8."""
    try:
        return _document(where, extract(orjson.loads(line)), line)
    except orjson.JSONDecodeError as error:
        try:
            line.decode()
        except UnicodeDecodeError as fault:
            return Record(where, problem=f"invalid UTF-8 at byte {fault.start} of the line", raw=line)
        return Record(where, problem=f"broken JSON: {error}", raw=line)
    except ValueError as error:
        return Record(where, problem=str(error), raw=line)


def _text(piece: Slice) -> Iterator[Record]:
    """A text file is one document."""
    with _open(piece.path) as file:
        data = file.read()
    try:
        yield _document(piece.path, data.decode("utf-8-sig"), data)
    except UnicodeDecodeError as error:
        yield Record(piece.path, problem=f"invalid UTF-8 at byte {error.start}", raw=data)


def _table(piece: Slice, extract: Extract) -> Iterator[Record]:
    """Parquet files, and the arrow files of a Hugging Face dataset saved to disk."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{piece.path}: reading it takes the package pyarrow; `pip install pyarrow`") from error
    try:
        if piece.path.lower().endswith(".parquet"):
            batches = parquet.ParquetFile(piece.path).iter_batches(batch_size=TABLE_ROWS)
        else:
            batches = pyarrow.ipc.open_stream(pyarrow.memory_map(piece.path))
        row = 0
        for batch in batches:
            for start in range(0, batch.num_rows, TABLE_ROWS):
                for record in batch.slice(start, TABLE_ROWS).to_pylist():
                    where = f"{piece.path}:row {row}"
                    row += 1
                    try:
                        yield _document(where, extract(record), b"")
                    except ValueError as error:
                        yield Record(where, problem=str(error), raw=orjson.dumps(record, default=str))
    except pyarrow.ArrowException as error:
        yield Record(piece.path, problem=f"damaged table: {' '.join(str(error).split())}")


def _document(where: str, text: str, raw: bytes) -> Record:
    if not text:
        return Record(where, problem="empty document", raw=raw)
    try:
        text.encode()  # a lone surrogate (half of a \\ud83d pair) is no text that any tokenizer can take
    except UnicodeEncodeError as error:
        return Record(where, problem=f"invalid UTF-8: lone surrogate at character {error.start}", raw=raw)
    return Record(where, text=text)


def size_of(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
