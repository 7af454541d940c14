"""Compressed files: against the standard library and zstandard, with something behind them, damaged, cut."""

import bz2
import gzip
import json
import lzma

import pytest
import zstandard

from data_prep import cli, packed, readers
from data_prep.extract import field_extractor
from data_prep.kinds.records import Slice
from megatron_taipan.data.indexed import IndexedReader

PACK = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".zstd": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
LINES = b"".join(b'{"text": "line %d"}\n' % (i * i) for i in range(20_000))
TEXTS = [f"line {i * i}" for i in range(20_000)]


def records(path):
    return list(readers.read_records(Slice(str(path), 0, path.stat().st_size), field_extractor("text")))


@pytest.mark.parametrize("ending", PACK)
def test_several_members_and_the_zeros_of_a_tape(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    pack = PACK[ending]
    path.write_bytes(pack(LINES[:7]) + pack(b"") + pack(LINES[7:]) + bytes(200_000))
    assert [(record.text, record.problem) for record in records(path)] == [(text, "") for text in TEXTS]


@pytest.mark.parametrize("ending", PACK)
@pytest.mark.parametrize("behind", [b"\n\n", b"\r\n" * 50_000, bytes(7) + b"x"])
def test_what_stands_behind_an_archive_is_named_and_costs_no_document(tmp_path, ending, behind):
    path = tmp_path / f"a.jsonl{ending}"
    whole = PACK[ending](LINES.rstrip())  # the last line has no end either
    path.write_bytes(whole + behind)
    *good, last = records(path)
    assert [record.text for record in good] == TEXTS and not any(record.problem for record in good)
    count, begin = len(behind.lstrip(b"\0")), behind.lstrip(b"\0")[:8]
    assert last.problem == f"garbage behind compressed data that is whole: {count} bytes, which begin with {begin!r}"
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(whole + behind)
    document, last = records(path)
    assert document.text.encode() == LINES.rstrip() and last.problem.startswith("garbage")


def test_garbage_under_every_policy(tmp_path, model, capsys):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(LINES) + b"\n\n")
    args = ["tokenize", "--input", str(path), "--tokenizer", model, "--output", str(tmp_path / "o")]
    assert cli.main(args) == 2
    assert "garbage behind compressed data that is whole: 2 bytes" in capsys.readouterr().err
    assert cli.main([*args, "--on-error", "skip"]) == 0
    assert IndexedReader(tmp_path / "o").n_documents == len(TEXTS)
    reasons = json.loads((tmp_path / "o.json").read_text())["skipped"]["reasons"]
    assert reasons == {"garbage behind compressed data that is whole": 1}


@pytest.mark.parametrize("ending", PACK)
def test_an_archive_that_is_cut_gives_what_came_before(tmp_path, ending, monkeypatch):
    monkeypatch.setattr(packed, "PACKED_READ_BYTES", 512)
    path = tmp_path / f"a.jsonl{ending}"
    pack = PACK[ending]
    first, second = pack(LINES[:7_004]), pack(LINES[7_004:])
    whole = first + second
    count = LINES[:7_004].count(b"\n")
    for at in (0, 1, len(first) + 1, len(first) + 3, len(first) + 9, len(whole) - 3, len(whole) - 1):
        path.write_bytes(whole[:at])
        *good, last = records(path)
        assert last.problem == "file ends before its compressed data does", at
        assert [record.text for record in good] == TEXTS[: len(good)]
        assert len(good) >= count * (at > len(first)), at


@pytest.mark.parametrize("ending", PACK)
def test_a_little_that_becomes_a_lot_is_unpacked_in_pieces(tmp_path, ending):
    path = tmp_path / f"a{ending}"
    path.write_bytes(PACK[ending](b"x" * 5_000_000))
    with packed.open_packed(str(path)) as file:
        sizes = [len(block) for block in iter(lambda: file.read1(1 << 16), b"")]
    assert sum(sizes) == 5_000_000


@pytest.mark.parametrize("ending", PACK)
def test_what_stands_behind_an_array_is_named_and_costs_no_entry(tmp_path, ending):
    path = tmp_path / f"a.json{ending}"
    path.write_bytes(PACK[ending](b'[{"text": "one"}, {"text": "two"}]') + b"behind")
    one, two, last = records(path)
    assert [(record.text, record.problem) for record in (one, two)] == [("one", ""), ("two", "")]
    assert last.problem == "garbage behind compressed data that is whole: 6 bytes, which begin with b'behind'"
