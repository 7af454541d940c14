"""Documents that are not held as a whole: the same ids, the same records, the same problems as those that are."""

import errno
import gzip
import io
import itertools
import json
import random
import tracemalloc

import numpy as np
import pytest
import tokenizers
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import cli, fast, long_text, readers, windows
from data_prep.extract import field_extractor, template_extractor
from data_prep.kinds import records
from data_prep.kinds.records import Slice
from data_prep.windows import encode_stream
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.tokenizer.hard_texts import HARD_TEXTS
from megatron_taipan.tokenizer.load import load_tokenizer


def hostile(speeches) -> dict[str, str]:
    """Texts that are hard to cut: no blanks, runs of one character, odd Unicode, spelled special tokens."""
    draw = random.Random(1)

    def drawn(letters, count=12_000):
        return "".join(draw.choice(letters) for _ in range(count))

    return {
        "speech": speeches[0][:60_000],
        "hard": "\n".join(HARD_TEXTS) * 20,
        "one letter": "a" * 12_000,
        "blanks": " " * 9_000,
        "new lines": "\n" * 9_000,
        "digits": drawn("0123456789"),
        "one digit": "7" * 12_001,
        "letters without blanks": drawn("etaoinshr"),
        "ideographs": drawn([chr(c) for c in range(0x4E00, 0x5200)]),
        "emoji": "\U0001f468\u200d\U0001f469\u200d\U0001f467" * 3_000,
        "accents": "e\u0301" * 6_000,
        "any character": drawn([chr(c) for c in [*range(1, 0xD7FF, 7), *range(0xE000, 0x10FFFF, 991), *b"ab c d"]]),
        "special tokens": "<|endoftext|></s><s>" * 800,
        "runs": "".join(draw.choice("a -\n=") * draw.randint(1, 300) for _ in range(120)),
        "long words": ("x" * 3000 + " " + "y" * 2500) * 3,
    }


def pieces(text, size):
    return (text[at : at + size] for at in range(0, len(text), size))


def in_windows(tokenizer, text, size=777, window=4096):
    return np.concatenate(list(encode_stream(tokenizer, pieces(text, size), window)))


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizer.json", "fast", "unigram"])
def test_windows_give_the_ids_of_the_whole_text(tmp_path, model, gpt2_like, speeches, monkeypatch, kind):
    path = {"tokenizer.json": gpt2_like, "unigram": str(tmp_path / "u.model")}.get(kind, model)
    if kind == "unigram":
        (tmp_path / "in.jsonl").write_text(json.dumps({"text": speeches[0]}))
        args = ["--output", path, "--vocab-size", "600", "--model-type", "unigram"]
        assert cli.main(["train-tokenizer", "--input", str(tmp_path / "in.jsonl"), *args]) == 0
    tokenizer = load_tokenizer(path)
    tokenizer = fast.fast_backend_of(tokenizer, path) if kind == "fast" else tokenizer
    sizes = []
    real = windows._ids

    def counted(tokenizer, text):
        sizes.append(len(text))
        return real(tokenizer, text)

    monkeypatch.setattr(windows, "_ids", counted)
    for name, text in hostile(speeches).items():
        if kind == "tokenizer.json" and name in ("blanks", "new lines"):
            text = text[:5_000]  # the library takes time that grows with the square of a run of blanks
        sizes.clear()
        assert np.array_equal(in_windows(tokenizer, text), tokenizer.encode_batch([text])[0]), name
        if kind != "unigram":
            assert max(sizes) <= 2 * 4096, name  # in bounded pieces, and not by making the window ever larger


@settings(max_examples=150, deadline=None)
@given(
    parts=st.lists(st.one_of(st.text(min_size=1, max_size=30), st.sampled_from("a \n\t0-")), min_size=1, max_size=12),
    times=st.integers(20, 200),
    window=st.integers(1100, 3000),
)
def test_windows_of_any_text(model, parts, times, window):
    tokenizer = load_tokenizer(model)
    text = "".join(parts) * times
    assert np.array_equal(in_windows(tokenizer, text, 501, window), tokenizer.encode_batch([text])[0])


def test_a_cut_needs_the_same_tokens_before_it_on_both_sides(tmp_path):
    """Pairs of x are joined first, then an x that is left over and a blank. The window's run of x is odd, the overlap's
    even: only the overlap has a border before the blank, and so has all that follows it."""
    letters = {"x": 0, "y": 1, " ": 2, "xx": 3, "x ": 4}
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(letters, [("x", "x"), ("x", " ")]))
    bpe.decoder = tokenizers.decoders.Fuse()
    bpe.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    text = ("x" * 1501 + " " + "y" * 700) * 6
    want = tokenizer.encode_batch([text])[0]
    assert (want == letters["x "]).sum() == 6 and (want == letters[" "]).sum() == 0
    assert np.array_equal(in_windows(tokenizer, text), want)


def test_a_cut_that_was_none_is_taken_back(model, speeches, monkeypatch):
    """A wrong proposal (here: the very middle of words) must be found by the next window."""
    tokenizer = load_tokenizer(model)
    text, real, lies = speeches[1][:30_000], windows._cut, itertools.count()

    def lying(tokenizer, text, overlap, lead):
        cut = real(tokenizer, text, overlap, lead)
        if cut is None or next(lies) % 3:
            return cut
        at = cut.at + 3  # "| the" becomes " th|e"
        wrong = windows._ids(tokenizer, text[at - cut.overlap : at])
        return windows._Cut(at, cut.overlap, wrong, windows._ids(tokenizer, text[:at]))

    monkeypatch.setattr(windows, "_cut", lying)
    assert np.array_equal(in_windows(tokenizer, text), tokenizer.encode_batch([text])[0])
    assert next(lies) > 6


def read_all(path, extract, start=0):
    """(text or None, problem) of every record."""
    found = []
    for record in readers.read_records(Slice(str(path), start, path.stat().st_size), extract):
        try:
            text = "".join(record.chunks) if record.chunks is not None else record.text
            found.append((text or None, record.problem))
        except long_text.BrokenText as error:
            found.append((None, str(error)))
    return found


def small(patch, block, string=20):
    patch.setattr(records, "LONG", 40)
    patch.setattr(long_text, "READ_BYTES", block)
    patch.setattr(long_text, "LONG_STRING", string)


text_strategy = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from('\\"/\n\u00e9\U0001f600u')))
record_strategy = st.fixed_dictionaries(
    {"text": st.one_of(text_strategy, st.text("\\", max_size=60), st.text('"', max_size=60))},
    optional={"a": text_strategy, 'odd "key\\': st.lists(st.one_of(text_strategy, st.integers(), st.none()))},
)


@settings(max_examples=250, deadline=None)
@given(
    content=st.lists(record_strategy, min_size=1, max_size=4),
    ascii=st.booleans(),
    block=st.integers(1, 50),
    damage=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=2),
    compress=st.booleans(),
)
def test_long_lines_read_as_short_ones_do(tmp_path_factory, content, ascii, block, damage, compress):
    path = tmp_path_factory.mktemp("lines") / ("x.jsonl.gz" if compress else "x.jsonl")
    raw = bytearray("\n".join(json.dumps(record, ensure_ascii=ascii) for record in content).encode())
    for at, value in damage:
        raw[at % len(raw)] = value
    path.write_bytes(gzip.compress(raw) if compress else raw)
    for extract in (field_extractor("text"), template_extractor("<{text}|{text}>")):
        want = read_all(path, extract)
        if not damage:
            assert [text for text, _ in want] == [extract(record) if extract(record) else None for record in content]
        with pytest.MonkeyPatch.context() as patch:
            small(patch, block)
            got = read_all(path, extract)
        assert [text for text, _ in got] == [text for text, _ in want]
        for (_, problem), (_, wanted) in zip(got, want, strict=True):
            # of two faults in one line the first that is met is named
            damaged = ("broken JSON", "invalid UTF-8")
            assert problem == wanted or (problem.startswith(damaged) and wanted.startswith(damaged))


@settings(max_examples=100, deadline=None)
@given(raw=st.binary(max_size=200), bom=st.booleans(), block=st.integers(1, 50))
def test_long_text_files_read_as_short_ones_do(tmp_path_factory, raw, bom, block):
    path = tmp_path_factory.mktemp("text") / "x.txt"
    path.write_bytes(b"\xef\xbb\xbf" * bom + raw + "\u00e9\U0001f600".encode() * 9 + raw)
    want = read_all(path, field_extractor("text"))
    with pytest.MonkeyPatch.context() as patch:
        small(patch, block)
        assert read_all(path, field_extractor("text")) == want


def test_every_place_within_an_escape_is_known():
    """What `complete` gives is always a border, and it lacks no more than the longest escape."""
    draw = random.Random(3)
    parts = [b"a", b"\\n", b"\\\\", b'\\"', b"\\u00e9", b"\\ud83d\\ude00", "\u00e9".encode(), "\U0001f600".encode()]
    for _ in range(400):
        chosen = [draw.choice(parts) for _ in range(40)]
        borders = set(itertools.accumulate(map(len, chosen)))
        raw = b"".join(chosen)
        for end in range(len(raw)):
            done = long_text.complete_length(bytearray(raw[:end]))
            assert done in borders | {0} and end - done < long_text.ESCAPE


def test_long_and_short_ways_write_the_same_bytes(tmp_path, model, speeches, monkeypatch):
    import pyarrow
    from pyarrow import parquet

    (tmp_path / "in").mkdir()
    lines = "".join(json.dumps({"n": i, "text": text}) + "\n" for i, text in enumerate([*speeches[:12], "short"]))
    (tmp_path / "in/a.jsonl").write_text(lines)
    (tmp_path / "in/b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "in/c.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (tmp_path / "in/d.txt").write_text(speeches[12])
    (tmp_path / "in/e.txt.gz").write_bytes(gzip.compress(speeches[13].encode()))
    parquet.write_table(pyarrow.table({"text": speeches[14:20]}), tmp_path / "in/f.parquet")

    def run(name):
        args = ["--input", tmp_path / "in", "--tokenizer", model, "--output", tmp_path / name]
        assert cli.main(["tokenize", *map(str, args), "--append-eod", "--prepend-bos"]) == 0
        return [(tmp_path / f"{name}{ending}").read_bytes() for ending in (".bin", ".idx")]

    whole = run("whole")
    monkeypatch.setattr(records, "LONG", 5_000)
    monkeypatch.setattr(long_text, "LONG_STRING", 3_000)
    monkeypatch.setattr(long_text, "READ_BYTES", 1_000)
    monkeypatch.setattr(records, "READ_BYTES", 1_000)
    monkeypatch.setattr(windows, "WINDOW", 2_500)
    monkeypatch.setattr("data_prep.inputs.SMALLEST_UNIT", 2_000)  # pieces that hold no beginning of a line
    monkeypatch.setattr("data_prep.inputs.UNITS", 500)
    assert run("chunks") == whole
    notes = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "chunks")]
    assert notes[0]["text_bytes"] == notes[1]["text_bytes"]


def test_a_long_document_that_breaks_off_leaves_nothing_behind(tmp_path, model, speeches, monkeypatch, capsys):
    monkeypatch.setattr(records, "LONG", 5_000)
    monkeypatch.setattr(records, "QUARANTINED_BYTES", 50)
    monkeypatch.setattr(long_text, "LONG_STRING", 3_000)
    monkeypatch.setattr(long_text, "READ_BYTES", 1_000)
    monkeypatch.setattr(windows, "WINDOW", 2_500)
    good = json.dumps({"text": speeches[0]})
    lines = [good, json.dumps({"text": speeches[1]})[:-30] + "\\x" + '"}', good, '{"n": "' + "a" * 9_000, good]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_bytes(speeches[2].encode() + b"\xff")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(speeches[3].encode())[:-2_000])
    (tmp_path / "d.txt").write_text(speeches[4])
    (tmp_path / "e.jsonl").write_text('{"text": 1, "other": "' + "b" * 9_000 + '"}')
    (tmp_path / "f.jsonl").write_text(" " * 20_000 + "\n" + good)
    (tmp_path / "g.txt").write_bytes(speeches[5].encode() + b"\xff")  # the last of its part
    inputs = sorted(tmp_path.glob("*.*"))
    args = ["tokenize", "--input", *map(str, inputs), "--tokenizer", model, "--output", str(tmp_path / "o")]
    assert cli.main(args) == 2
    assert "broken JSON" in capsys.readouterr().err
    assert cli.main([*args, "--on-error", "quarantine"]) == 0
    tokenizer, reader = load_tokenizer(model), IndexedReader(tmp_path / "o")
    want = [speeches[0]] * 3 + [speeches[4], speeches[0]]
    assert [reader.document(i).tolist() for i in range(reader.n_documents)] == [
        tokenizer.encode_batch([text])[0].tolist() for text in want
    ]
    entries = [json.loads(line) for line in (tmp_path / "o.skipped.jsonl").read_text().splitlines()]
    reasons = ["broken JSON", "broken JSON", "invalid UTF-8 at byte", "file ends before", "field 'text' is not a text"]
    reasons.append("invalid UTF-8 at byte")
    assert all(e["reason"].startswith(reason) for e, reason in zip(entries, reasons, strict=True))
    assert all(len(entry["raw"]) <= 50 for entry in entries) and entries[4]["raw"].startswith('{"text": 1')


def test_a_long_line_takes_no_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONG", 1 << 16)
    monkeypatch.setattr(long_text, "LONG_STRING", 1 << 16)
    monkeypatch.setattr(long_text, "READ_BYTES", 1 << 16)
    text = 'some words, "quoted" and \\ more\n' * 200_000  # 6 MB
    (tmp_path / "x.jsonl").write_text(json.dumps({"before": text[: 1 << 20], "text": text}))
    tracemalloc.start()
    (record,) = readers.read_records(
        Slice(str(tmp_path / "x.jsonl"), 0, 1 << 30), field_extractor("text"), str(tmp_path)
    )
    sizes = [len(chunk) for chunk in record.chunks]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(sizes) == len(text) and peak < 4 << 20, peak


def test_a_full_disk_leaves_no_long_document_out(tmp_path, model, monkeypatch, capsys):
    """What a long line is decoded into finds no room: that is no fault of the input that may be skipped."""
    small(monkeypatch, 50)
    (tmp_path / "x.jsonl").write_text(json.dumps({"text": "some words " * 20}) + '\n{"text": "short"}\n')
    args = ["tokenize", "--input", str(tmp_path / "x.jsonl"), "--tokenizer", model, "--output", str(tmp_path / "o")]

    class Full(io.BytesIO):
        def flush(self):
            raise OSError(errno.ENOSPC, "No space left on device")

    for backend in ("auto", "reference"):  # met by the proof, met by a worker
        with monkeypatch.context() as patch:
            patch.setattr("tempfile.TemporaryFile", lambda **_: Full())
            assert cli.main([*args, "--on-error", "skip", "--backend", backend]) == 2
        error = capsys.readouterr().err
        assert "No space left on device; free some space and run the same command again" in error
    assert cli.main([*args, "--on-error", "skip"]) == 0
    assert IndexedReader(tmp_path / "o").n_documents == 2


def test_too_much_beside_the_text_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LONG", 1_000)
    monkeypatch.setattr(long_text, "READ_BYTES", 1_000)
    monkeypatch.setattr(long_text, "LONGEST_SKELETON", 5_000)
    (tmp_path / "x.jsonl").write_text(json.dumps({"n": list(range(3_000)), "text": "x"}) + '\n{"text": "next"}')
    assert read_all(tmp_path / "x.jsonl", field_extractor("text")) == [
        (None, "record too large: over 5000 bytes besides its long strings"),
        ("next", ""),
    ]
