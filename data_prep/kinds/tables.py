"""The rows of tables: parquet; arrow and feather, as a file (IPC file format) or as a stream (IPC stream format).

Only the columns that are asked for are read: a column of pictures beside the text costs neither time nor memory.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import orjson

from data_prep.extract import Extract
from data_prep.kinds.records import InputKind, Reading, Record, Slice, document

ROWS, BYTES = 256, 8 << 20  # of a table turned into Python objects at a time, at most and about
BUFFER_BYTES = 1 << 20
ARROW_FILE, FEATHER_1 = b"ARROW1\0\0", b"FEA1"


def _parquet(span: Slice, reading: Reading) -> Iterator[Record]:
    return _records(_rows(span.path, reading.extract.fields, _open_parquet), reading.extract)


def _arrow(span: Slice, reading: Reading) -> Iterator[Record]:
    return _records(_rows(span.path, reading.extract.fields, _open_arrow), reading.extract)


def _records(rows: Iterable[tuple[str, dict, str]], extract: Extract) -> Iterator[Record]:
    """The documents of rows as `_rows` gives them."""
    for where, row, problem in rows:
        if problem:
            yield Record(where, problem=problem)
            continue
        try:
            yield document(where, extract(row), b"")
        except ValueError as error:
            yield Record(where, problem=_fault(row) or str(error), raw=_as_json(row))


def _rows(
    path: str, fields: tuple[str, ...], open_table: Callable[[str, tuple[str, ...]], tuple[list[str], Iterator[Any]]]
) -> Iterator[tuple[str, dict, str]]:
    """(where, row, problem): each row with the columns that dotted paths begin in, or why there is none (any more).

    Args:
        open_table: of a path and fields the names of the wanted columns, and batches of them.

    Raises:
        OSError: the file cannot be read.
    """
    import pyarrow

    try:
        names, batches = open_table(path, fields)
        if doubles := sorted({name for name in names if names.count(name) > 1}):
            problem = f"several columns of one name: {names.count(doubles[0])} are called {doubles[0]!r}; rename them"
            yield path, {}, problem
            return
        number = 0
        for batch in batches:
            for start in range(0, batch.num_rows, ROWS):
                for row in _as_python(batch.slice(start, ROWS)):
                    yield f"{path}:row {number}", row, ""
                    number += 1
    except (pyarrow.ArrowException, _NoTable, UnicodeDecodeError) as error:  # the last of a column's name
        yield path, {}, f"damaged table: {' '.join(str(error).split())}"


class _NoTable(Exception):
    """A file is not a table that is read; the message says why."""


def _open_parquet(path: str, fields: tuple[str, ...]) -> tuple[list[str], Iterator[Any]]:
    """The wanted columns of a parquet file, and its batches, of fewer rows where rows are large."""
    from pyarrow import parquet

    table = parquet.ParquetFile(path, pre_buffer=False, buffer_size=BUFFER_BYTES)
    names = table.schema_arrow.names
    wanted = [names[i] for i in _wanted(names, fields)]
    # not of the wanted columns only: pyarrow ends the process when it looks at a column whose description is damaged
    groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
    largest = max((group.total_byte_size // max(1, group.num_rows) for group in groups), default=0)
    return wanted, table.iter_batches(max(1, min(ROWS, BYTES // max(1, largest))), columns=wanted)


def _open_arrow(path: str, fields: tuple[str, ...]) -> tuple[list[str], Iterator[Any]]:
    """The wanted columns of an arrow file of either form, and its batches."""
    import pyarrow

    source = pyarrow.memory_map(path)
    begin = source.read(len(ARROW_FILE))
    source.seek(0)
    if begin.startswith(FEATHER_1):
        raise _NoTable("feather of version 1, which is not written any more; save it as parquet")
    read = pyarrow.ipc.open_file if begin == ARROW_FILE else pyarrow.ipc.open_stream
    names = read(source).schema.names
    wanted = _wanted(names, fields)
    source.seek(0)
    table = read(source, options=pyarrow.ipc.IpcReadOptions(included_fields=wanted or [0]))
    batches = (table.get_batch(i) for i in range(table.num_record_batches)) if begin == ARROW_FILE else iter(table)
    batches = (_checked(batch) for batch in batches)
    if not wanted:
        batches = (batch.select([]) for batch in batches)
    return [names[i] for i in wanted], batches


def _checked(batch: Any) -> Any:
    """A batch whose values are where it says. It is used as it is in the file, so others would be read from outside
    of it.

    Raises:
        pyarrow.ArrowException: they do not.
    """
    import pyarrow

    for column in batch.columns:
        try:
            column.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            if "UTF8" not in str(error):  # looked at last, and the fault of a single row
                raise
    return batch


def _wanted(names: list[str], fields: tuple[str, ...]) -> list[int]:
    """The columns in which fields begin."""
    return [i for i, name in enumerate(names) if any((field + ".").startswith(name + ".") for field in fields)]


def _as_python(batch: Any) -> list[dict]:
    """The rows as Python objects. A value that cannot be one (text that is not UTF-8, a date beyond the year 9999)
    becomes the error, which matters only where the text is taken from it."""
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):
        return [{n: _value(c[i]) for n, c in zip(batch.schema.names, batch, strict=True)} for i in range(len(batch))]


def _value(cell: Any) -> object:
    try:
        return cell.as_py()
    except (ValueError, OverflowError) as error:
        return error


def _fault(row: dict) -> str:
    """What is wrong with the first value of a row that is an error; empty where none is."""
    for name, value in row.items():
        if isinstance(value, UnicodeDecodeError):
            return f"invalid UTF-8: field {name!r} at byte {value.start}"
        if isinstance(value, Exception):
            return f"field {name!r} cannot be read: {value}"
    return ""


def _as_json(row: dict) -> bytes:
    """What was read of a row, for quarantine."""
    return orjson.dumps(row, default=_plain, option=orjson.OPT_NON_STR_KEYS)


def _plain(value: object) -> str:
    """What JSON does not know, and what was there where a text is not UTF-8."""
    return value.object.decode("utf-8", "backslashreplace") if isinstance(value, UnicodeDecodeError) else str(value)


PARQUET = InputKind("parquet, a row a record", (".parquet",), _parquet, compressible=False, needs="pyarrow")
ARROW = InputKind(
    "arrow, file or stream format, a row a record",
    (".arrow", ".feather"),
    _arrow,
    compressible=False,
    needs="pyarrow",
)
