"""merge, split, verify, stats, dedup on pairs of the .bin/.idx format."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import cli
from data_prep.commands.dedup import repeated
from megatron_taipan.data.indexed import IndexedReader, IndexedWriter

ROOT = Path(__file__).parents[2]
many_documents = st.lists(st.lists(st.integers(0, 5), max_size=6), max_size=15)


def write(prefix, documents, dtype=np.uint16):
    with IndexedWriter(prefix, dtype) as writer:
        for document in documents:
            writer.add_document(document)
    return str(prefix)


def documents(prefix):
    reader = IndexedReader(prefix)
    return [reader.document(i).tolist() for i in range(reader.n_documents)]


def run(*args):
    return cli.main([str(arg) for arg in args])


@settings(max_examples=30)
@given(parts=st.lists(many_documents, min_size=1, max_size=12))
def test_merge_keeps_every_document_in_natural_order(tmp_path_factory, parts):
    folder = tmp_path_factory.mktemp("parts")
    for number, part in enumerate(parts):
        write(folder / f"p_{number}", part)
    assert run("merge", folder, "--output", folder / "all") == 0
    assert documents(folder / "all") == [document for part in parts for document in part]


def test_merge_bad_input(tmp_path, capsys):
    a, b = write(tmp_path / "a", [[1]]), write(tmp_path / "b", [[1]], np.int32)
    for args, message in (
        ((a, b, "--output", tmp_path / "o"), "int32 and .* uint16"),
        ((a, a, "--output", tmp_path / "o"), "twice"),
        ((a, tmp_path / "../" / tmp_path.name / "a", "--output", tmp_path / "o"), "twice"),
        ((a, "--output", b), "--overwrite"),
        ((tmp_path / "none", "--output", tmp_path / "o"), "does not exist"),
        ((tmp_path / "x*", "--output", tmp_path / "o"), "matches no"),
    ):
        assert run("merge", *args) == 2
        assert re.search(message, capsys.readouterr().err)
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx", "b.bin", "b.idx"]


def test_merge_beyond_40_billion_tokens_does_not_overflow(tmp_path):
    """Sparse files: 30 documents of 2^31 - 1 tokens, 64 billion in all, take no disk."""
    from megatron_taipan.data.indexed import commit, write_index

    for name, count in (("a", 20), ("b", 10)):
        prefix = str(tmp_path / name)
        np.full(count, 2**31 - 1, "<i4").tofile(prefix + ".len")
        with open(prefix + ".bin.partial", "wb") as file:
            file.truncate(count * (2**31 - 1) * 2)
        write_index(prefix + ".idx.partial", np.dtype(np.uint16), prefix + ".len")
        commit(prefix)
        reader = IndexedReader(prefix)
        assert reader.n_tokens == count * (2**31 - 1)
        assert reader.start(count - 1) == (count - 1) * (2**31 - 1)


@settings(max_examples=30)
@given(content=many_documents, size=st.integers(1, 20))
def test_split_into_shards_and_back(tmp_path_factory, content, size):
    folder = tmp_path_factory.mktemp("split")
    (folder / "out").mkdir()
    assert run("split", write(folder / "x", content), "--output", folder / "out/s", "--shard-tokens", size) == 0
    assert run("merge", folder / "out", "--output", folder / "again") == 0
    assert documents(folder / "again") == content
    assert (folder / "again.idx").read_bytes() == (folder / "x.idx").read_bytes()
    for path in (folder / "out").glob("*.idx"):
        inside = documents(str(path)[:-4])
        assert sum(map(len, inside)) <= size or len(inside) == 1


def test_split_by_document_holds_out_what_training_would(tmp_path):
    from megatron_taipan.data.split import held_out_documents

    prefix = write(tmp_path / "x", [[i] * (i % 4 + 1) for i in range(100)])
    assert run("split", prefix, "--output", tmp_path / "y", "--valid-fraction", "0.2") == 0
    held = held_out_documents(IndexedReader(prefix), 0.2).tolist()
    assert [d[0] for d in documents(tmp_path / "y-valid")] == held and len(held) == 20
    assert [d[0] for d in documents(tmp_path / "y-train")] == sorted(set(range(100)) - set(held))


@settings(max_examples=60)
@given(content=many_documents)
def test_dedup_keeps_the_first_of_each(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("dedup")
    assert run("dedup", write(folder / "x", content), "--output", folder / "y") == 0
    assert documents(folder / "y") == [list(d) for d in dict.fromkeys(map(tuple, content))]


def test_dedup_compares_documents_of_equal_hash(tmp_path, monkeypatch):
    class Same:
        def __init__(self, *_, **__): ...
        def digest(self):
            return bytes(8)

    monkeypatch.setattr("data_prep.commands.dedup.blake2b", Same)
    reader = IndexedReader(write(tmp_path / "x", [[1], [2], [1], [3], [2], [2]]))
    assert repeated(reader).tolist() == [False, False, True, False, True, True]


@pytest.fixture
def made(tmp_path):
    """A tokenized corpus in two shards, with its manifest."""
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps({"text": f"document {i} says something"}) + "\n" for i in range(60)))
    model = tmp_path / "t.model"
    assert run("train-tokenizer", "--input", source, "--output", model, "--vocab-size", 380) == 0
    prefix = tmp_path / "o"
    args = ("--input", source, "--tokenizer", model, "--output", prefix, "--append-eod", "--shard-tokens", 400)
    assert run("tokenize", *args) == 0
    return prefix, model


def test_verify_passes_what_tokenize_made(made, capsys):
    prefix, model = made
    assert run("verify", prefix, "--tokenizer", model) == 0
    out = capsys.readouterr().out
    assert f"{prefix} is whole" in out and "checksums" in out and "document 0: 'document 0 says" in out


def flip(path, at, value=None):
    data = bytearray(path.read_bytes())
    data[at] = data[at] ^ 1 if value is None else value
    path.write_bytes(data)


def test_verify_finds_damage(made, tmp_path, capsys):
    prefix, model = made
    shard = tmp_path / "o-00000.bin"
    whole = shard.read_bytes()
    flip(shard, 40)
    assert run("verify", prefix) == 2 and "checksum" in capsys.readouterr().err
    shard.write_bytes(whole[:-2])
    assert run("verify", prefix) == 2 and "its index describes" in capsys.readouterr().err
    shard.write_bytes(whole)
    manifest = json.loads((tmp_path / "o.json").read_text())
    manifest["shards"][0]["documents"] += 1
    (tmp_path / "o.json").write_text(json.dumps(manifest))
    assert run("verify", prefix) == 2 and "manifest says" in capsys.readouterr().err
    (tmp_path / "o.json").unlink()
    assert run("verify", str(prefix) + "-00000") == 0 and "no manifest" in capsys.readouterr().out
    assert (
        run("verify", str(prefix) + "-00000", "--vocab-size", 100) == 2 and "vocabulary has" in capsys.readouterr().err
    )


def test_verify_finds_missing_and_doubled_ends(made, tmp_path, capsys):
    prefix, _ = made
    manifest = json.loads((tmp_path / "o.json").read_text())
    for shard in manifest["shards"]:
        del shard["bin_xxh3_128"]
    (tmp_path / "o.json").write_text(json.dumps(manifest))
    first = documents(tmp_path / "o-00000")[0]
    shard = tmp_path / "o-00000.bin"
    whole = shard.read_bytes()
    flip(shard, 2 * (len(first) - 1), 9)
    assert run("verify", prefix) == 2 and "document 0 does not end" in capsys.readouterr().err
    shard.write_bytes(whole)
    flip(shard, 2, 2), flip(shard, 3, 0)
    assert run("verify", prefix) == 2 and "before its end" in capsys.readouterr().err


def test_verify_passes_ends_that_were_asked_for(tmp_path, gpt2_like, capsys):
    """One token for both ends, as GPT-2 has, and text that was allowed to spell it."""
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"text": "one <|endoftext|> two"}) + "\n")
    args = ("tokenize", "--input", source, "--tokenizer", gpt2_like, "--append-eod")
    for name, more in (("both", ("--prepend-bos", "--bos-token", "<|endoftext|>")), ("inside", ("--allow-special",))):
        assert run(*args, "--output", tmp_path / name, *more) == 0
        assert documents(tmp_path / name)[0].count(0) == 2
        assert run("verify", tmp_path / name) == 0
        assert "is whole: structure, ids, checksums, counts, ends of documents" in capsys.readouterr().out


def test_a_tokenizer_of_other_data_is_one_line(made, tmp_path, capsys):
    _, model = made
    prefix = write(tmp_path / "x", [[3, 5000]])
    for command in ("verify", "stats", "inspect"):
        assert run(command, prefix, "--tokenizer", model) == 2
        error = capsys.readouterr().err
        assert "5000" in error and "380" in error and "with another tokenizer" in error


@pytest.mark.parametrize("bad", [-5, 2_000_000_000])
def test_an_id_that_no_tokenizer_has_is_one_line_with_its_place(made, tmp_path, capsys, bad):
    _, model = made
    prefix = write(tmp_path / "x", [[3, 5], [6, 7, 8]], np.int32)
    ids = np.array([3, 5, 6, bad, 8], "<i4")
    ids.tofile(prefix + ".bin")
    for args in (
        ("stats", prefix),
        ("stats", prefix, "--tokenizer", model),
        ("inspect", prefix, "--tokenizer", model),
        ("verify", prefix, "--vocab-size", 380),
    ):
        assert run(*args) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and f"{prefix}.bin holds id {bad} at token 3 (in document 1)" in error
    assert run("inspect", prefix) == 0 and f"6 {bad} 8" in capsys.readouterr().out  # numbers, as they stand there


def test_no_manifest_stays_beside_other_content(made, tmp_path, capsys):
    """`verify` would call the new pair damaged, and `tokenize` would call it complete."""
    prefix, model = made
    args = ("tokenize", "--input", tmp_path / "in.jsonl", "--tokenizer", model, "--output", tmp_path / "pair")
    assert run(*args) == 0
    assert run("merge", f"{prefix}-*", "--output", tmp_path / "pair", "--overwrite") == 0
    assert run("verify", tmp_path / "pair") == 0 and "no checksums in its manifest" in capsys.readouterr().out
    assert run("merge", f"{prefix}-*", "--output", prefix) == 0  # its manifest is the shards'
    assert run("verify", prefix) == 0 and "-00000: " in capsys.readouterr().out


def test_stats(tmp_path, capsys):
    prefix = write(tmp_path / "x", [[5, 5, 5], [7], [5, 9, 9, 9, 9, 9]])
    assert run("stats", prefix, "--top", 2) == 0
    out = capsys.readouterr().out
    assert "3 documents, 10 tokens" in out and "3 different ids of 10; 7 never occur" in out
    rows = [line.split()[:3] for line in out.splitlines() if "%" in line and "percentiles" not in line]
    assert rows == [["9", "5", "50.00"], ["5", "4", "40.00"]]
    assert "50%: 3" in out and "99%: 6" in out


@pytest.mark.parametrize(
    ("index", "command"),
    [
        (1, ("merge",)),
        (1, ("dedup",)),
        (1, ("split", "--shard-tokens", 99)),
        (2, ("split", "--shard-tokens", 99)),
        (2, ("split", "--valid-fraction", 0.5)),
    ],
)
def test_a_full_disk_leaves_nothing_under_a_final_name(tmp_path, capsys, monkeypatch, index, command):
    """All tokens fit, and so do the indexes before this one."""
    from data_prep import shards

    prefix, written = write(tmp_path / "x", [[i] * 9 for i in range(20)]), []

    def write_until_full(path, *rest):
        written.append(path)
        if len(written) == index:
            raise OSError(28, "No space left on device", path)
        write_index(path, *rest)

    write_index = shards.write_index
    monkeypatch.setattr(shards, "write_index", write_until_full)
    assert run(*command, prefix, "--output", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"the disk of {tmp_path / 'out'} is full" in error
    assert sorted(os.listdir(tmp_path)) == ["x.bin", "x.idx"]


def test_a_full_disk_while_tokens_are_copied(tmp_path):
    """A limit on the size of files stands for the full disk; what is still buffered does not fit either."""
    prefix = write(tmp_path / "x", [[i] for i in range(9000)])
    before = sorted(os.listdir(tmp_path))
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
import errno
from data_prep import cli
errno.ENOSPC = errno.EFBIG
sys.exit(cli.main([*sys.argv[1:], {prefix!r}, "--output", {str(tmp_path / "out")!r}]))
"""
    for command in (("merge",), ("dedup",), ("split", "--shard-tokens", "8000"), ("split", "--valid-fraction", "0.5")):
        done = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and "is full" in done.stderr and done.stderr.count("\n") == 1
        assert sorted(os.listdir(tmp_path)) == before


def test_shards_of_an_earlier_split_do_not_stay_beside_the_new_ones(tmp_path, capsys):
    prefix = write(tmp_path / "x", [[i] * 9 for i in range(20)])
    assert run("split", prefix, "--output", tmp_path / "y", "--shard-tokens", 40) == 0
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run("split", prefix, "--output", tmp_path / "y", "--shard-tokens", 90, "--overwrite") == 2
    assert "y-00002 exists" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_an_output_that_cannot_be_written_is_one_line(tmp_path, model, capsys):
    (tmp_path / "file").touch()
    prefix, text = write(tmp_path / "x", [[1], [2]]), tmp_path / "a.jsonl"
    text.write_text('{"text": "some words"}\n' * 50)
    before = sorted(os.listdir(tmp_path))
    for output in (tmp_path / "file/o", tmp_path / ("o" * 300), "/proc/o", "", f"{tmp_path}/"):
        for command in (
            ("tokenize", "--input", text, "--tokenizer", model),
            ("train-tokenizer", "--input", text, "--vocab-size", 360),
            ("merge", prefix),
            ("dedup", prefix),
            ("split", prefix, "--shard-tokens", 1),
            ("split", prefix, "--valid-fraction", 0.5),
        ):
            assert run(*command, "--output", output) == 2
            error = capsys.readouterr().err
            assert error.count("\n") == 1 and "--output" in error
    assert sorted(os.listdir(tmp_path)) == before


def test_stats_divide_the_bytes_of_the_text_by_its_tokens(tmp_path, gpt2_like, capsys):
    texts = ["naïve café", "日本語 text", "plain words only"]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "in.jsonl").write_text(lines)
    prefix = tmp_path / "o"
    assert run("tokenize", "--input", tmp_path / "in.jsonl", "--tokenizer", gpt2_like, "--output", prefix) == 0
    capsys.readouterr()
    assert run("stats", prefix) == 0
    size, tokens = sum(len(text.encode()) for text in texts), IndexedReader(prefix).n_tokens
    assert f"{size} bytes of text, {size / tokens:.3f} bytes per token" in capsys.readouterr().out
