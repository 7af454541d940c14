"""Tables: both forms of arrow, odd names of columns, and columns that nobody asked for."""

import pyarrow
import pytest
from pyarrow import feather, parquet

from data_prep import readers
from data_prep.extract import field_extractor, lookup, template_extractor
from data_prep.kinds.records import Slice

TEXTS = [f"text {i}, \u00fcn\u00ef" for i in range(700)]


def stream(table, path):
    with pyarrow.ipc.new_stream(path, table.schema) as file:
        file.write_table(table)


def ipc_file(table, path):
    with pyarrow.ipc.new_file(path, table.schema) as file:
        file.write_table(table, max_chunksize=300)


def packed_file(table, path):
    feather.write_feather(table, path, compression="lz4")


WRITE = {
    "a.parquet": parquet.write_table,
    "stream.arrow": stream,
    "file.arrow": ipc_file,
    "packed.arrow": packed_file,
    "b.feather": packed_file,
}


def records(path, extract):
    found = readers.read_records(Slice(str(path), 0, 1), extract)
    return [(record.text, record.problem) for record in found]


@pytest.mark.parametrize("name", WRITE)
def test_every_form_of_a_table(tmp_path, name):
    numbers = list(range(len(TEXTS)))
    WRITE[name](pyarrow.table({"n": numbers, "text": TEXTS, "in": [{"x": [i]} for i in numbers]}), str(tmp_path / name))
    assert records(tmp_path / name, field_extractor("text")) == [(text, "") for text in TEXTS]
    made = records(tmp_path / name, template_extractor("{n}: {text} {in.x.0}"))
    assert made == [(f"{i}: {text} {i}", "") for i, text in enumerate(TEXTS)]
    assert records(tmp_path / name, field_extractor("body")) == [("", "no field 'body'")] * len(TEXTS)
    assert records(tmp_path / name, field_extractor("te")) == [("", "no field 'te'")] * len(TEXTS)


def test_a_table_that_is_cut_or_none(tmp_path):
    path = tmp_path / "a.arrow"
    ipc_file(pyarrow.table({"text": TEXTS}), str(path))
    path.write_bytes(path.read_bytes()[:-50])
    ((_, problem),) = records(path, field_extractor("text"))
    assert problem.startswith("damaged table: ")
    path.write_bytes(b"FEA1 and so on")
    assert "feather of version 1" in records(path, field_extractor("text"))[0][1]
    path.write_bytes(b"")
    assert records(path, field_extractor("text"))[0][1]


@pytest.mark.parametrize("name", WRITE)
def test_a_column_whose_name_has_dots(tmp_path, name):
    inside = [{"text": "inside", "title": "t"}] * 2
    table = pyarrow.table({"content": inside, "content.text": ["a", "b"], "content.text.raw": ["c", "d"]})
    WRITE[name](table, str(tmp_path / name))
    path = tmp_path / name
    assert records(path, field_extractor("content.text")) == [("a", ""), ("b", "")]
    assert records(path, field_extractor("content.text.raw")) == [("c", ""), ("d", "")]
    assert records(path, template_extractor("{content.title} {content.text}")) == [("t a", ""), ("t b", "")]


def test_paths_with_names_that_have_dots():
    record = {"a": {"b.c": {"d": 1}, "b": {"c": 2}}, "a.b": {"x": 3}, "l": [{"y.z": 4}], "7": 5, "q": [6]}
    for field, value in (("a.b.x", 3), ("l.0.y.z", 4), ("7", 5), ("q.0", 6)):
        assert lookup(record, field) == value
    assert lookup({"a": {"b.c": {"d": 1}, "b": {"c": 2}}}, "a.b.c.d") == 1
    for field in ("q.\u00b2", "a.b.c.d", "q.0.x", "l.-1"):
        with pytest.raises(ValueError, match="no field"):
            lookup(record, field)


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "file.arrow"])
def test_two_columns_of_one_name(tmp_path, name):
    columns = [pyarrow.array(values) for values in (["a"], ["b"], ["c"], [b"d"], [b"e"])]
    table = pyarrow.table(columns, names=["text", "body", "text", "image", "image"])
    WRITE[name](table, str(tmp_path / name))
    assert records(tmp_path / name, field_extractor("body")) == [("b", "")]
    ((_, problem),) = records(tmp_path / name, field_extractor("text"))
    assert problem == "several columns of one name: 2 are called 'text'; rename them"


def test_a_column_that_is_not_asked_for_is_not_read(tmp_path):
    """Its bytes in the file are overwritten: only who reads them can notice."""
    path = tmp_path / "a.parquet"
    pictures = [bytes([i % 251]) * 5_000 for i in range(len(TEXTS))]
    table = pyarrow.table({"image": [{"bytes": b, "path": "x"} for b in pictures], "text": TEXTS})
    parquet.write_table(table, path, compression="none", use_dictionary=False)
    column = parquet.ParquetFile(path).metadata.row_group(0).column(0)
    assert column.path_in_schema == "image.bytes"
    raw = bytearray(path.read_bytes())
    raw[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = (
        b"\xff" * column.total_compressed_size
    )
    path.write_bytes(raw)
    assert records(path, field_extractor("text")) == [(text, "") for text in TEXTS]
    ((_, problem),) = records(path, field_extractor("image.path"))
    assert problem.startswith("cannot be read: ") and "\n" not in problem
