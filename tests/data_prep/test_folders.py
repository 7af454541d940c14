"""What is read of folders and globs, what is passed over and told, and files that are reached twice."""

import bz2
import gzip
import json
import lzma
import os

import pytest
import zstandard

from data_prep import cli, readers
from data_prep.commands.merge import expand_prefixes
from data_prep.extract import field_extractor
from data_prep.inputs import expand, natural, work_units
from data_prep.kinds import json_files
from data_prep.kinds.records import Slice
from megatron_taipan.errors import UserError

RECORDS = [{"text": f"text {i}, \u00fcn\u00ef", "n": i} for i in range(50)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def texts(path, start=0, stop=None):
    stop = path.stat().st_size if stop is None else stop
    return [(r.text, r.problem) for r in readers.read_records(Slice(str(path), start, stop), field_extractor("text"))]


def names(paths, folder):
    return [os.path.relpath(path, folder) for path in paths]


def test_every_ending_is_read(tmp_path):
    pack = {"gz": gzip.compress, "zst": zstandard.compress, "zstd": zstandard.compress, "bz2": bz2.compress}
    pack |= {"xz": lzma.compress, "": bytes}
    made = [f"a.{kind}{packed and '.'}{packed}" for kind in ("jsonl", "ndjson", "jsonlines", "json") for packed in pack]
    for name in made:
        (tmp_path / name).write_bytes(pack[name.split(".", 2)[2] if name.count(".") > 1 else ""](LINES))
    found = expand([str(tmp_path)])
    assert names(found, tmp_path) == sorted(made, key=natural) and len(made) == 24
    for name in made:
        assert texts(tmp_path / name) == [(record["text"], "") for record in RECORDS], name


def test_what_is_passed_over_is_told_with_counts(tmp_path, capsys):
    kept = ["a.jsonl", "deep/b.json.gz"]
    left = ["x.csv", "y.csv", "deep/z.tsv.gz", "README.md", "dataset_info.json", "LICENSE", ".hidden.jsonl"]
    for name in [*kept, *left, ".ipynb_checkpoints/a-checkpoint.jsonl"]:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_text("x")
    want = "2 .csv, 1 .md, 1 .tsv.gz, 1 dataset_info.json, 1 folder .ipynb_checkpoints, 1 hidden, 1 without an ending"
    for given in ("in", "in/**"):
        assert names(expand([str(tmp_path / given)]), tmp_path / "in") == kept
        told = capsys.readouterr().out
        assert told.startswith(f"{tmp_path / given}: passed over ") and told.count("\n") == 1
        assert given != "in" or want in told
        assert "2 .csv" in told and "1 .tsv.gz" in told
    assert names(expand([str(tmp_path / "in/deep/b.json.gz")]), tmp_path / "in") == kept[1:]
    assert capsys.readouterr().out == ""
    (tmp_path / "in/a.jsonl").unlink()
    for given in ("in/*.*", "in/*.csv"):
        with pytest.raises(UserError, match="matches no file of a known kind .but .*2 .csv"):
            expand([str(tmp_path / given)])
    (tmp_path / "in/deep/b.json.gz").unlink()
    with pytest.raises(UserError, match="holds no file of a known kind .but 2 .csv"):
        expand([str(tmp_path / "in")])


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("begin", [b"", b"\xef\xbb\xbf", b"\n \n"])
def test_a_json_file_that_is_one_value(tmp_path, indent, begin):
    path = tmp_path / "a.json"
    path.write_bytes(begin + json.dumps([*RECORDS, {"n": 1}, 7], indent=indent).encode())
    good = [(record["text"], "") for record in RECORDS]
    bad = [("", "no field 'text'"), ("", "not a JSON object but a int")]
    assert texts(path) == good + bad
    assert texts(path, 0, 100) + texts(path, 100, 300) + texts(path, 300) == good + bad  # in slices
    path.write_bytes(begin + json.dumps(RECORDS[0], indent=indent).encode())
    assert texts(path) == good[:1]
    path.write_bytes(begin + json.dumps(RECORDS, indent=indent).encode()[:-20])
    ((_, problem),) = texts(path)
    assert problem.startswith("broken JSON") and "not JSON lines" in problem


def test_a_json_file_of_lines_with_a_broken_first_one(tmp_path):
    path = tmp_path / "a.json"
    for broken in (b'{"text": "cut', b'{"text": "cut,', b"{", b'{"n": 1,'):
        path.write_bytes(broken + b"\n" + LINES)
        first, *others = texts(path)
        assert first[1].startswith("broken JSON") and others == [(record["text"], "") for record in RECORDS]


def test_an_array_that_is_too_large_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "ARRAY", 500)
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    ((_, problem),) = texts(tmp_path / "a.json")
    assert problem.startswith("array too large: one JSON value of over 500 bytes") and "jq" in problem


def test_lines_of_every_name_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.inputs.SMALLEST_UNIT", 100)
    for name in ("a.json", "a.ndjson"):
        (tmp_path / name).write_bytes(LINES)
        pieces = work_units([(str(tmp_path / name), len(LINES))])
        found = [text for (piece,) in pieces for text in texts(tmp_path / name, piece.start, piece.stop)]
        assert len(pieces) > 10 and found == [(record["text"], "") for record in RECORDS]


def test_one_file_by_two_names(tmp_path):
    """As a hub's cache has it: two snapshots of links to one blob."""
    for name in ("blobs/1", "snapshots/old/other.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(LINES)
    (tmp_path / "snapshots/new").mkdir()
    for snapshot in ("old", "new"):
        (tmp_path / "snapshots" / snapshot / "a.jsonl").symlink_to("../../blobs/1")
    assert len(expand([str(tmp_path / "snapshots/old")])) == 2
    with pytest.raises(UserError, match="old/a.jsonl is the same file as .*new/a.jsonl .1 such files."):
        expand([str(tmp_path)])
    (tmp_path / "snapshots/new/a.jsonl").unlink()
    os.link(tmp_path / "snapshots/old/other.jsonl", tmp_path / "hard.jsonl")
    with pytest.raises(UserError, match="is the same file as"):
        expand([str(tmp_path)])


def test_splits_of_a_saved_dataset(tmp_path, model, capsys):
    import datasets

    rows = datasets.Dataset.from_list(RECORDS)
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(str(tmp_path / "both"))
    datasets.DatasetDict(train=rows).save_to_disk(str(tmp_path / "one"))
    args = ["tokenize", "--tokenizer", model, "--output", str(tmp_path / "o"), "--input"]
    for given in ("both", ""):
        assert cli.main([*args, str(tmp_path / given)]) == 2
        assert "holds several splits of a dataset: test (1 file(s)), train (1 file(s)); name" in capsys.readouterr().err
    assert cli.main([*args, str(tmp_path / "both/train")]) == 0
    assert len(expand([str(tmp_path / "one")])) == len(expand([str(tmp_path / "both/test")])) == 1
    assert len(expand([str(tmp_path / "both/train"), str(tmp_path / "both/test")])) == 2


def test_files_of_several_splits_are_told(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "validation.jsonl", "contest.jsonl"):
        (tmp_path / "data" / name).write_text("x")
    for given in (tmp_path, tmp_path / "data/*"):
        assert len(expand([str(given)])) == 4
        told = capsys.readouterr().out
        assert "several splits are read together, by their names: 2 train, 1 validation" in told
    assert len(expand([str(tmp_path / "data/train*")])) == 2 and capsys.readouterr().out == ""


def test_names_that_look_like_globs_or_numbers(tmp_path):
    odd = tmp_path / "c4[en]"
    odd.mkdir()
    for name in ("x1\u00b22.jsonl", "x10.jsonl", "x9.jsonl", "b*.jsonl", "\u0663.jsonl"):
        (odd / name).write_text("x")
    found = [os.path.basename(path) for path in expand([str(odd)])]
    assert found.index("x9.jsonl") < found.index("x10.jsonl") and len(found) == 5
    assert expand([str(odd / "b*.jsonl")]) == [str(odd / "b*.jsonl")]
    for name in ("d4[en]", "d4e"):
        (tmp_path / f"{name}.idx").touch()
    for given in ("d4[en]", "d4[en].idx", "d4[en].bin"):
        assert expand_prefixes([str(tmp_path / given)]) == [str(tmp_path / "d4[en]")]
    (tmp_path / "d4[en].idx").unlink()
    assert expand_prefixes([str(tmp_path / "d4[en]")]) == [str(tmp_path / "d4e")]
