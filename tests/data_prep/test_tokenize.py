"""`tokenize` from text to shards: against the tokenizer library and Megatron's reader, through bad input and kills."""

import gzip
import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data_prep import cli
from data_prep.kinds import records
from data_prep.pool import Pool
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.tokenizer.sentencepiece_model import SentencePieceTokenizer

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data_prep/sample/state_of_the_union.jsonl.gz"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tok.model"
    assert cli.main(["train-tokenizer", "--input", str(SAMPLE), "--output", str(path), "--vocab-size", "1000"]) == 0
    return str(path)


def tokenize(*args):
    return cli.main(["tokenize", *map(str, args)])


def jsonl(path, texts, field="text"):
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


def expected(model, texts, eod=True):
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    return [processor.encode(text) + [processor.eos_id()] * eod for text in texts]


def documents(prefix):
    reader = IndexedReader(prefix)
    return [reader.document(i).tolist() for i in range(reader.n_documents)]


def test_paths_that_are_not_utf8_are_refused(tmp_path, model, monkeypatch, capsys):
    """They go into JSON; a relative one has the working directory's."""
    (place := Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))).mkdir()
    source = jsonl(tmp_path / "in.jsonl", ["a text"])
    monkeypatch.chdir(place)
    for output in (place / "out", "out"):
        assert tokenize("--input", source, "--tokenizer", model, "--output", output) == 2
        assert "caf\\xe9/out' is not UTF-8" in capsys.readouterr().err
    shutil.copy(model, "tok.model")
    assert tokenize("--input", source, "--tokenizer", "tok.model", "--output", tmp_path / "out") == 2
    assert "caf\\xe9/tok.model' is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [1, 3])
def test_every_document_in_order_with_the_library_s_ids(tmp_path, model, speeches, workers):
    # many small and some large documents, cut into many pieces
    texts = [part for speech in speeches for part in (speech[:2000], speech[:50], speech[2000:])]
    source = jsonl(tmp_path / "in.jsonl", texts)
    out = tmp_path / "out"
    assert tokenize("--input", source, "--tokenizer", model, "--output", out, "--append-eod", "--workers", workers) == 0
    assert documents(out) == expected(model, texts)
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.bin", "out.idx", "out.json"]


def test_megatron_reads_it_and_writes_the_same_bytes(tmp_path, model, speeches):
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    out = tmp_path / "out"
    assert tokenize("--input", SAMPLE, "--tokenizer", model, "--output", out, "--append-eod") == 0
    want = expected(model, speeches)
    theirs = indexed.IndexedDataset(str(out))
    assert [theirs[i].tolist() for i in range(len(theirs))] == want
    builder = indexed.IndexedDatasetBuilder(str(tmp_path / "b.bin"), dtype=np.uint16)
    for ids in want:
        builder.add_document(np.array(ids), [len(ids)])
    builder.finalize(str(tmp_path / "b.idx"))
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"out{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()


def test_formats_and_order_of_files(tmp_path, model):
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    jsonl(folder / "a_10.jsonl", ["ten"])
    jsonl(folder / "a_2.jsonl", ["two", "two more"])
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        file.write('{"text": "packed"}\n{"text": "again"}')
    (folder / "deep/c.txt").write_text("a text file\nis one document\n")
    (folder / "notes.md").write_text("no input")
    assert tokenize("--input", folder, "--tokenizer", model, "--output", tmp_path / "out") == 0
    texts = ["two", "two more", "ten", "packed", "again", "a text file\nis one document\n"]
    assert documents(tmp_path / "out") == expected(model, texts, eod=False)


def test_bos_and_eod_stand_once(tmp_path, model):
    source = jsonl(tmp_path / "in.jsonl", ["a", "</s> b <s>"])
    assert (
        tokenize("--input", source, "--tokenizer", model, "--output", tmp_path / "o", "--append-eod", "--prepend-bos")
        == 0
    )
    for document in documents(tmp_path / "o"):
        assert (document.index(1), document.index(2)) == (0, len(document) - 1)
        assert document.count(1) == document.count(2) == 1


BAD_LINES = [
    (b'{"text": "cut', "broken JSON"),
    (b'{"text": "\xff"}', "invalid UTF-8"),
    (b'{"text": "\\ud800"}', "invalid UTF-8: lone surrogate at character 0"),
    (b'{"txt": "x"}', "no field 'text'"),
    (b'{"text": 3}', "field 'text' is not a text but a int"),
    (b'["x"]', "not a JSON object but a list"),
    (b'{"text": ""}', "empty document"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_record_stops_the_run_and_leaves_no_output(tmp_path, model, capsys, line, reason):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    assert tokenize("--input", source, "--tokenizer", model, "--output", tmp_path / "o") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"{source}:byte 17" in error and reason in error and "--on-error skip" in error
    assert not (tmp_path / "o.bin").exists() and not (tmp_path / "o.idx").exists()


@pytest.mark.parametrize("policy", ["skip", "quarantine"])
def test_bad_records_are_left_out_and_counted(tmp_path, model, capsys, policy):
    source = tmp_path / "in.jsonl"
    good = b'{"text": "good"}\n'
    source.write_bytes(good + b"\n".join(line for line, _ in BAD_LINES) + b"\n\n  \n" + good)
    assert tokenize("--input", source, "--tokenizer", model, "--output", tmp_path / "o", "--on-error", policy) == 0
    assert documents(tmp_path / "o") == expected(model, ["good", "good"], eod=False)
    manifest = json.loads((tmp_path / "o.json").read_text())
    assert manifest["skipped"]["total"] == len(BAD_LINES) and manifest["documents"] == 2
    assert "left out 7 records" in capsys.readouterr().out
    entries = [json.loads(line) for line in (tmp_path / "o.skipped.jsonl").read_text().splitlines()]
    for entry, (line, reason) in zip(entries, BAD_LINES, strict=True):
        assert entry["reason"].startswith(reason)
        assert ("raw" in entry) == (policy == "quarantine")
        if policy == "quarantine":
            assert entry["raw"].rstrip("\n") == line.decode("utf-8", "backslashreplace")


def test_damaged_files_are_reported_never_silently_short(tmp_path, model, capsys):
    packed = gzip.compress(b"".join(b'{"text": "line %d"}\n' % i for i in range(5000)))
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "b.jsonl.gz").write_bytes(b"no gzip at all")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00bad")
    jsonl(tmp_path / "d.jsonl", ["good"])
    inputs = sorted(tmp_path.glob("*.*"))
    assert tokenize("--input", *inputs, "--tokenizer", model, "--output", tmp_path / "o") == 2
    assert "file ends before its compressed data does" in capsys.readouterr().err
    assert tokenize("--input", *inputs, "--tokenizer", model, "--output", tmp_path / "o", "--on-error", "skip") == 0
    manifest = json.loads((tmp_path / "o.json").read_text())
    assert manifest["skipped"]["total"] >= 3 and 0 < manifest["documents"] < 5001
    assert documents(tmp_path / "o")[-1] == expected(model, ["good"], eod=False)[0]


def test_an_unreadable_file_among_many(tmp_path, model, capsys, monkeypatch):
    """A link to nothing, and a file that may not be opened: reported under every policy, wherever it stands."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(200):
        jsonl(folder / f"{number}.jsonl", [f"text {number}"])
    (folder / "50.jsonl").unlink()
    (folder / "50.jsonl").symlink_to(tmp_path / "nothing")
    real = records.open_file

    def refusing(path, limits):
        if path.endswith("/120.jsonl"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, limits)

    monkeypatch.setattr(records, "open_file", refusing)
    for given in (folder, folder / "*"):
        args = ("--input", given, "--tokenizer", model, "--output", tmp_path / "o", "--overwrite")
        assert tokenize(*args) == 2
        assert "50.jsonl: cannot be read: No such file" in capsys.readouterr().err
        assert tokenize(*args, "--on-error", "skip") == 0
        texts = [f"text {number}" for number in range(200) if number not in (50, 120)]
        assert documents(tmp_path / "o") == expected(model, texts, eod=False)
        entries = [json.loads(line) for line in (tmp_path / "o.skipped.jsonl").read_text().splitlines()]
        assert [e["reason"] for e in entries] == [
            "cannot be read: No such file or directory",
            "cannot be read: Permission denied",
        ]


def test_documents_of_special_tokens_only_and_without_tokens(tmp_path, gpt2_like):
    source = jsonl(tmp_path / "in.jsonl", ["a", "<|endoftext|><|endoftext|>", "b <|endoftext|>"])
    args = ("--input", source, "--tokenizer", gpt2_like, "--on-error", "skip")
    assert tokenize(*args, "--output", tmp_path / "text") == 0
    assert len(documents(tmp_path / "text")) == 3  # text that spells them is text
    assert tokenize(*args, "--output", tmp_path / "special", "--allow-special") == 0
    assert [0 in document for document in documents(tmp_path / "special")] == [False, True]
    skipped = json.loads((tmp_path / "special.json").read_text())["skipped"]
    assert skipped["reasons"] == {"document of special tokens only": 1}


def test_documents_without_tokens(tmp_path, model, monkeypatch):
    real = SentencePieceTokenizer.encode_batch

    def dropping(self, texts):  # as tokenizers that strip white space do
        ids, counts = real(self, [text.strip() for text in texts])
        return ids, counts

    monkeypatch.setattr(SentencePieceTokenizer, "encode_batch", dropping)
    source = jsonl(tmp_path / "in.jsonl", ["a", "  \n", "b", " "])
    args = ("--input", source, "--tokenizer", model, "--output", tmp_path / "o", "--backend", "reference")
    assert tokenize(*args, "--on-error", "skip", "--append-eod") == 0
    assert documents(tmp_path / "o") == expected(model, ["a", "b"])
    assert json.loads((tmp_path / "o.json").read_text())["skipped"]["reasons"] == {"document without tokens": 2}


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path, model, speeches, monkeypatch, capsys):
    real = SentencePieceTokenizer.encode_batch

    def lying(self, texts):
        ids, counts = real(self, texts)
        return np.where(ids == ids.max(), 70_000, ids), counts

    monkeypatch.setattr(SentencePieceTokenizer, "encode_batch", lying)
    for long in (4 << 20, 2_000):  # as a whole and in chunks
        monkeypatch.setattr(records, "LONG", long)
        monkeypatch.setattr("data_prep.long_text.LONG_STRING", long)
        source = jsonl(tmp_path / "in.jsonl", [speeches[0]])
        args = ("--input", source, "--tokenizer", model, "--output", tmp_path / "o", "--backend", "reference")
        assert tokenize(*args) == 2
        assert "gave id 70000, beyond its vocabulary of 1000" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"", "empty"), (b"\n \n", "holds no document"), (b"[]\n", "not a JSON object")],
)
def test_no_corpus(tmp_path, model, capsys, content, message):
    source = tmp_path / "in.jsonl"
    if content is not None:
        source.write_bytes(content)
    assert tokenize("--input", source, "--tokenizer", model, "--output", tmp_path / "o") == 2
    assert message in capsys.readouterr().err
    assert [name for name in os.listdir(tmp_path) if name.startswith("o.") and name != "o.work"] == []


def test_bad_arguments(tmp_path, model, capsys):
    source = jsonl(tmp_path / "in.jsonl", ["x"])
    common = ("--input", source, "--output", tmp_path / "o")
    for args, message in (
        ((*common, "--tokenizer", tmp_path / "none.model"), "does not exist"),
        ((*common, "--tokenizer", source), "is not a sentencepiece model"),
        ((*common, "--tokenizer", model, "--workers", 0), "--workers 0"),
        ((*common, "--tokenizer", model, "--append-eod", "--eod-token", "<nope>"), "'<nope>'"),
        ((*common, "--input", source, source, "--tokenizer", model), "named twice"),
        ((*common, "--input", tmp_path, "--tokenizer", model, "--text-field", "body"), "no field 'body'"),
    ):
        assert tokenize(*args) == 2
        assert message in capsys.readouterr().err


def test_an_output_of_something_else_is_not_replaced(tmp_path, model, capsys):
    a, b = jsonl(tmp_path / "a.jsonl", ["first"]), jsonl(tmp_path / "b.jsonl", ["second"])
    run = ("--tokenizer", model, "--output", tmp_path / "o")
    assert tokenize("--input", a, *run) == 0
    assert tokenize("--input", a, *run) == 0 and "complete already" in capsys.readouterr().out
    assert tokenize("--input", b, *run) == 2 and "--overwrite" in capsys.readouterr().err
    assert documents(tmp_path / "o") == expected(model, ["first"], eod=False)
    assert tokenize("--input", b, *run, "--overwrite") == 0
    assert documents(tmp_path / "o") == expected(model, ["second"], eod=False)


def test_shards_hold_whole_documents_in_order(tmp_path, model, speeches):
    texts = [speech[: 100 * (i % 7 + 1)] for i, speech in enumerate(speeches)] + [speeches[0]]
    source = jsonl(tmp_path / "in.jsonl", texts)
    assert tokenize("--input", source, "--tokenizer", model, "--output", tmp_path / "o", "--shard-tokens", 900) == 0
    manifest = json.loads((tmp_path / "o.json").read_text())
    found = []
    for number, shard in enumerate(manifest["shards"]):
        assert shard["prefix"] == f"o-{number:05d}"
        inside = documents(tmp_path / shard["prefix"])
        assert shard["documents"] == len(inside) and shard["tokens"] == sum(map(len, inside))
        assert shard["tokens"] <= 900 or len(inside) == 1
        found += inside
    assert found == expected(model, texts, eod=False) and len(manifest["shards"]) > 5


def digests(folder, name):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if p.name.startswith(name)}


def test_killed_at_any_instant_the_same_command_continues_to_the_same_bytes(tmp_path, model, speeches):
    """SIGKILL at random instants, again and again, until a run gets through."""
    lines = []
    for i in range(12 * len(speeches)):
        lines.append(json.dumps({"text": speeches[i % len(speeches)][i : 9000 + i]}) if i % 50 else "{broken")
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(lines))

    def command(folder):
        (tmp_path / folder).mkdir(exist_ok=True)
        return [
            sys.executable, "-m", "data_prep", "tokenize", "--input", source, "--tokenizer", model, "--workers", "2",
            "--output", tmp_path / folder / "o", "--append-eod", "--on-error", "quarantine", "--shard-tokens", "400000",
        ]  # fmt: skip

    started = time.monotonic()
    subprocess.run(command("calm"), cwd=ROOT, check=True, capture_output=True)
    calm = time.monotonic() - started
    draw, kills = random.Random(5), 0
    for attempt in range(30):
        process = subprocess.Popen(command("killed"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            # not every attempt may die young, or nothing would ever be finished
            process.communicate(timeout=calm * (0.25 + draw.random() * min(1, 0.2 * attempt)))
            assert process.returncode == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            if (tmp_path / "killed/o.json").exists():  # it was past the end already, cleaning up
                assert digests(tmp_path / "killed", "o-") == digests(tmp_path / "calm", "o-")
    assert kills > 0
    assert digests(tmp_path / "killed", "o") == digests(tmp_path / "calm", "o")
    again = subprocess.run(command("killed"), cwd=ROOT, check=True, capture_output=True, text=True)
    assert "complete already" in again.stdout


class Stopped(Exception):
    """A run that ends when all parts are made and none of its shards has its name."""


def stopped(*_):
    raise Stopped


def test_finished_parts_are_taken_over_unless_they_are_damaged(tmp_path, model, speeches, capsys, monkeypatch):
    texts = [speech[:9000] for speech in speeches]
    source = jsonl(tmp_path / "in.jsonl", texts)
    args = ("--input", source, "--tokenizer", model, "--output", tmp_path / "o", "--append-eod")
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.join.Joiner.finish", stopped)
        with pytest.raises(Stopped):
            tokenize(*args)
    assert not list(tmp_path.glob("o.*.partial"))
    parts = sorted((tmp_path / "o.work").glob("*.bin"))
    assert len(parts) > 2
    kept = parts[0].stat().st_mtime_ns
    damaged = bytearray(parts[1].read_bytes())
    damaged[10] ^= 1
    parts[1].write_bytes(damaged)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        assert tokenize(*args) == 0
    assert f"continuing: {len(parts) - 1} of {len(parts)} parts" in capsys.readouterr().out
    assert parts[0].stat().st_mtime_ns == kept
    assert documents(tmp_path / "o") == expected(model, texts)


@pytest.mark.parametrize("deleted", [0, 1, 4, 8])
def test_no_old_shard_outlives_a_kill_while_they_are_replaced(tmp_path, model, monkeypatch, deleted):
    source = jsonl(tmp_path / "in.jsonl", ["some words"] * 8)
    args = ("--input", source, "--tokenizer", model, "--output", tmp_path / "o", "--overwrite")
    assert tokenize(*args, "--shard-tokens", 1 + len(expected(model, ["some words"])[0]) * 2) == 0
    assert len(list(tmp_path.glob("o-*.bin"))) == 4
    real, left = Path.unlink, [True] * deleted  # of 4 pairs and a manifest

    def dying(path, missing_ok=False):
        if path.suffix in (".bin", ".idx", ".json"):
            if not left:
                raise Stopped
            left.pop()
        real(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", dying)
        with pytest.raises(Stopped):
            tokenize(*args)
    assert tokenize(*args) == 0
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "o.bin", "o.idx", "o.json"]


def test_a_changed_input_is_not_mixed_with_old_parts(tmp_path, model, speeches, monkeypatch):
    source = jsonl(tmp_path / "in.jsonl", ["old"])
    args = ("--input", source, "--tokenizer", model, "--output", tmp_path / "o")
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.join.Joiner.finish", stopped)
        with pytest.raises(Stopped):
            tokenize(*args)
    assert not list(tmp_path.glob("o.*.partial"))
    jsonl(source, ["new one"])
    assert tokenize(*args) == 0
    assert documents(tmp_path / "o") == expected(model, ["new one"], eod=False)


def test_a_full_disk_is_one_line_and_the_same_command_continues(tmp_path, model, speeches, capsys, monkeypatch):
    source = jsonl(tmp_path / "in.jsonl", speeches)
    args = ("--input", source, "--tokenizer", model, "--output", tmp_path / "o")

    def full(*_):
        raise OSError(28, "No space left on device", "o.bin.partial")

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.shards.copy_range", full)
        assert tokenize(*args) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is full" in error and "same command" in error
    assert not (tmp_path / "o.idx").exists()
    assert tokenize(*args) == 0
    assert "continuing" in capsys.readouterr().out
    assert documents(tmp_path / "o") == expected(model, speeches, eod=False)


def test_a_full_disk_in_a_worker(tmp_path, model, speeches):
    """A limit on the size of files stands for the full disk: the write in the worker itself fails."""
    source = jsonl(tmp_path / "in.jsonl", speeches)
    code = f"""
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
import errno, data_prep.commands.tokenize as t
from data_prep import cli
errno.ENOSPC = errno.EFBIG
args = ["--input", {str(source)!r}, "--tokenizer", {model!r}, "--output", {str(tmp_path / "o")!r}]
sys.exit(cli.main(["tokenize", *args]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "is full" in done.stderr and done.stderr.count("\n") == 1


def test_a_killed_worker_is_noticed(tmp_path, model, speeches):
    source = jsonl(tmp_path / "in.jsonl", speeches * 8)
    process = subprocess.Popen(
        [sys.executable, "-m", "data_prep", "tokenize", "--input", source, "--tokenizer", model, "--output",
         tmp_path / "o", "--workers", "2"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    children = []
    while not children and process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and "killed by signal 9 (SIGKILL)" in error and error.count("\n") == 1


def test_a_stopped_worker_is_not_waited_for():
    import multiprocessing

    with Pool(2, {"pid": lambda _: os.getpid()}) as pool:
        pids = [pid for _, pid in pool.run("pid", [0, 1])]
        os.kill(pids[0], signal.SIGSTOP)
        watch = multiprocessing.get_context("fork").Process(target=_kill_later, args=(pids[0],))
        watch.start()
        started = time.monotonic()
    took = time.monotonic() - started
    watch.kill()
    watch.join()
    assert took < 5


def _kill_later(pid):
    time.sleep(10)
    os.kill(pid, signal.SIGKILL)


def test_workers_die_with_their_parent(tmp_path, model, speeches):
    source = jsonl(tmp_path / "in.jsonl", speeches * 8)
    process = subprocess.Popen(
        [sys.executable, "-m", "data_prep", "tokenize", "--input", source, "--tokenizer", model, "--output",
         tmp_path / "o", "--workers", "2"],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    children = []
    while len(children) < 2 and process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    time.sleep(0.2)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 5
    while alive := [pid for pid in children if Path(f"/proc/{pid}/cmdline").exists() and _state(pid) not in "ZX"]:
        assert time.monotonic() < deadline, alive
        time.sleep(0.05)


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def test_two_runs_at_once_on_one_output(tmp_path, model, capsys, monkeypatch):
    import fcntl

    source = jsonl(tmp_path / "in.jsonl", ["x"])
    spooled = tmp_path / "o.spool/stdin.jsonl"
    spooled.parent.mkdir()
    spooled.write_text("what the other run reads")
    with open(tmp_path / "o.work.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for given in (source, "-"):
            monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "y"}')))
            assert tokenize("--input", given, "--tokenizer", model, "--output", tmp_path / "o") == 2
            assert "another run" in capsys.readouterr().err
    assert spooled.read_text() == "what the other run reads"


def test_a_full_disk_while_stdin_is_kept(tmp_path, model, capsys, monkeypatch):
    class Full(io.RawIOBase):
        def readable(self):
            return True

        def readinto(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BufferedReader(Full())))
    assert tokenize("--input", "-", "--tokenizer", model, "--output", tmp_path / "o") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is full" in error and "same command" in error


def test_ctrl_c_is_one_line_and_the_same_command_continues(tmp_path, model, speeches):
    """Ctrl-C reaches all processes of the terminal, at any moment; parent and workers."""
    source = jsonl(tmp_path / "in.jsonl", speeches * 8)
    command = [
        sys.executable, "-m", "data_prep", "tokenize", "--input", source, "--tokenizer", model, "--output",
        tmp_path / "o", "--workers", "2", "--backend", "reference",
    ]  # fmt: skip
    for wait in (0, 0.02, 0.3):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)
        children = []
        while not children and process.poll() is None:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        time.sleep(wait)
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 130 and error == "stopped by Ctrl-C; the same command continues\n"
        end = time.monotonic() + 10  # workers watch for their parent's end
        while any(_state(pid) not in "ZX" for pid in children) and time.monotonic() < end:
            time.sleep(0.02)
        assert all(_state(pid) in "ZX" for pid in children)
        assert not list(tmp_path.glob("o.*x")) and not list(tmp_path.glob("o.*partial"))
    assert subprocess.run(command, cwd=ROOT).returncode == 0
    assert documents(tmp_path / "o") == expected(model, speeches, eod=False) * 8


@pytest.mark.parametrize("code", ["ENOLCK", "EOPNOTSUPP", "ENOSYS"])
def test_a_file_system_without_locks_is_said_and_used(tmp_path, model, capsys, monkeypatch, code):
    import errno
    import fcntl

    def flock(*_):
        raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)))

    monkeypatch.setattr(fcntl, "flock", flock)
    source = jsonl(tmp_path / "in.jsonl", ["x y"])
    assert tokenize("--input", source, "--tokenizer", model, "--output", tmp_path / "o") == 0
    error = capsys.readouterr().err
    assert os.strerror(getattr(errno, code)) in error and "another run is" not in error and error.count("\n") == 1
    assert documents(tmp_path / "o") == expected(model, ["x y"], eod=False)
