"""Kinds of input files: one record adds one, which is then read everywhere; an ending without one is an error."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_prep import cli
from data_prep.extract import field_extractor
from data_prep.inputs import expand, work_units
from data_prep.kinds.records import InputKind, Record, Slice, document, open_file
from data_prep.kinds.registry import INPUT_KINDS, input_kind, is_splittable, register_kind
from data_prep.packed import FORMS
from data_prep.readers import read_records
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.errors import UserError
from megatron_taipan.tokenizer.load import load_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
TEXTS = [f"number {n} of the lines" for n in range(3000)]


def read_tsv(piece, reading):
    """The lines that begin in the slice, under the names of the first line, which every slice reads."""
    stop = piece.stop if is_splittable(piece.path) else float("inf")
    with open_file(piece.path, reading.limits) as file:
        head = file.readline()
        at = len(head)
        if piece.start > at:
            file.seek(piece.start - 1)
            at = piece.start - 1 + len(file.readline())
        while at < stop and (line := file.readline()):
            at += len(line)
            cells = [part.decode().rstrip("\n").split("\t") for part in (head, line)]
            try:
                yield document(piece.path, reading.extract(dict(zip(*cells, strict=False))), line)
            except ValueError as error:
                yield Record(piece.path, problem=str(error), raw=line)


TSV = InputKind("tab-separated values", (".tsv", ".tab"), read_tsv, splittable=True)


@pytest.fixture
def tsv():
    register_kind(TSV)
    yield TSV
    for ending in TSV.endings:
        del INPUT_KINDS[ending]


def tokenize(*arguments):
    return cli.main(["tokenize", *map(str, arguments), "--workers", "2", "--backend", "reference"])


def test_one_record_adds_a_kind_of_input(tmp_path, model, tsv, monkeypatch, capsys):
    """It is cut among workers, found in folders, unpacked, told in the help, and its bad records are counted."""
    monkeypatch.setattr("data_prep.inputs.SMALLEST_UNIT", 4_000)
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.tsv").write_text("n\ttext\n" + "".join(f"{n}\t{text}\n" for n, text in enumerate(TEXTS)))
    assert len(work_units([(str(folder / "a.tsv"), (folder / "a.tsv").stat().st_size)])) > 10
    shutil.copy(folder / "a.tsv", folder / "b.tab")
    subprocess.run(["gzip", folder / "b.tab"], check=True)
    (folder / "c.tsv").write_text("n\ttext\n7\n8\tlast\n")
    arguments = ("--input", folder, "--tokenizer", model, "--output", tmp_path / "o")
    assert tokenize(*arguments, "--on-error", "skip") == 0
    tokenizer, reader = load_tokenizer(model), IndexedReader(tmp_path / "o")
    documents = [reader.document(i).tolist() for i in range(reader.n_documents)]
    assert documents == [tokenizer.encode(text) for text in [*TEXTS, *TEXTS, "last"]]
    assert json.loads((tmp_path / "o.json").read_text())["skipped"]["reasons"] == {"no field 'text'": 1}
    with pytest.raises(SystemExit):
        tokenize("--help")
    assert ".tsv, .tab" in " ".join(capsys.readouterr().out.split())


def test_an_ending_of_no_kind_is_an_error_wherever_it_comes_from(tmp_path, model, capsys):
    """Among them one that a list of splittable endings would have let through as lines of JSON."""
    file = tmp_path / "a.tsv"
    file.write_text('{"text": "a"}\n')
    for name in (file, tmp_path, tmp_path / "*"):
        with pytest.raises(UserError, match=r"known kind.*\.jsonl|\.tsv"):
            expand([str(name)])
    with pytest.raises(UserError, match=r"a.tsv is of no known kind; known are \.jsonl, .*also with \.gz"):
        list(read_records(Slice(str(file), 0, 14), field_extractor("text")))
    assert tokenize("--input", file, "--tokenizer", model, "--output", tmp_path / "o") == 2
    assert input_kind("a.parquet") is not None and input_kind("a.parquet.gz") is None  # compressed inside


def test_endings_belong_to_one_kind(tsv):
    for endings, message in (((".json",), "taken already"), (("tsv",), "not the ending"), ((".gz",), "not the ending")):
        with pytest.raises(ValueError, match=message):
            register_kind(InputKind("other", endings, read_tsv))
    register_kind(TSV)  # again


def test_a_package_that_a_kind_needs_is_named(tmp_path, tsv, monkeypatch):
    monkeypatch.setitem(INPUT_KINDS, ".tsv", InputKind("other", (".tsv",), read_tsv, needs="no_such_package"))
    (tmp_path / "a.tsv").write_text("text\na\n")
    with pytest.raises(UserError, match=r"a.tsv: reading it takes the package no_such_package; `pip install"):
        list(read_records(Slice(str(tmp_path / "a.tsv"), 0, 7), field_extractor("text")))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "a.txt.zst").write_bytes(b"x")
    with pytest.raises(UserError, match=r"a.txt.zst: reading it takes the package zstandard"):
        list(read_records(Slice(str(tmp_path / "a.txt.zst"), 0, 1), field_extractor("text")))


def test_the_page_lists_every_kind():
    """One row a kind, and the compressions, as the table of the code has them."""
    page = PAGE.read_text(encoding="utf-8")
    rows = {
        f"| {' '.join(f'`{ending}`' for ending in kind.endings)} | {kind.name} | {'yes' if kind.compressible else 'no'}"
        f" | {'yes' if kind.splittable else 'no'} | {kind.needs and f'`{kind.needs}`'} |"
        for kind in INPUT_KINDS.values()
    }
    table = re.search(r"^\| endings \|.*\n\|[-| ]+\n((?:\|.*\n)+)", page, re.M)[1]
    assert set(re.sub(r" +", " ", table).strip().splitlines()) == {re.sub(r" +", " ", row) for row in rows}
    assert f"compressed: {', '.join(f'`{ending}`' for ending in FORMS)}" in page
