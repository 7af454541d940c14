"""Input formats beyond JSON lines and text; tokenizers and their fast twins."""

import gzip
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import cli, fast, readers
from data_prep.extract import field_extractor, template_extractor
from data_prep.inputs import LARGEST_UNIT, expand, natural, work_units
from data_prep.kinds.records import Slice
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.errors import UserError
from megatron_taipan.tokenizer.base import Tokenizer
from megatron_taipan.tokenizer.hard_texts import HARD_TEXTS
from megatron_taipan.tokenizer.load import load_tokenizer

SAMPLE = Path(__file__).parents[2] / "data_prep/sample/state_of_the_union.jsonl.gz"
TEXTS = ["first text", "second\ntext", "the third, ünïcödé"]


def tokenize(*args):
    return cli.main(["tokenize", *map(str, args)])


def decoded(prefix, model):
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    reader = IndexedReader(prefix)
    return [processor.decode(reader.document(i).tolist()) for i in range(reader.n_documents)]


def test_parquet_and_saved_datasets_and_zstandard(tmp_path, model):
    import datasets
    import pyarrow
    import zstandard
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": TEXTS, "n": [1, 2, 3]}), tmp_path / "a.parquet", row_group_size=2)
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    two_frames = zstandard.compress(lines[:20]) + zstandard.compress(lines[20:])
    (tmp_path / "z.jsonl.zst").write_bytes(two_frames)
    for source in ("a.parquet", "saved", "z.jsonl.zst"):
        assert tokenize("--input", tmp_path / source, "--tokenizer", model, "--output", tmp_path / f"o_{source}") == 0
        assert decoded(tmp_path / f"o_{source}", model) == TEXTS


def test_damaged_tables_and_zstandard(tmp_path, model, capsys):
    import pyarrow
    import zstandard
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"body": TEXTS}), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-30])
    packed = zstandard.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(9000)))
    (tmp_path / "c.jsonl.zst").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "d.jsonl.zst").write_bytes(b"nothing of the kind")
    for name, reason in (
        ("a.parquet", "no field 'text'"),
        ("b.parquet", "damaged table"),
        ("c.jsonl.zst", "ends before its compressed data"),
        ("d.jsonl.zst", "damaged compressed data"),
    ):
        assert tokenize("--input", tmp_path / name, "--tokenizer", model, "--output", tmp_path / "o") == 2
        assert reason in capsys.readouterr().err


def test_values_of_a_table_that_python_cannot_hold(tmp_path, model):
    """They are a problem of their row, and only where the text is taken from them."""
    import pyarrow
    from pyarrow import parquet

    content = b"good", b"bad \xff\xfe", "ünï".encode(), b"last"
    ends = pyarrow.array(np.cumsum([0, *map(len, content)]), pyarrow.int32()).buffers()[1]
    text = pyarrow.Array.from_buffers(pyarrow.string(), 4, [None, ends, pyarrow.py_buffer(b"".join(content))])
    when = pyarrow.array([0, 0, 2**62, 0], pyarrow.timestamp("us"))
    parquet.write_table(pyarrow.table({"text": text, "when": when, "in": [{"n": 1}] * 4}), tmp_path / "a.parquet")
    args = ("--input", tmp_path / "a.parquet", "--tokenizer", model, "--output", tmp_path / "o")
    assert tokenize(*args) == 2
    assert tokenize(*args, "--on-error", "quarantine") == 0
    assert decoded(tmp_path / "o", model) == ["good", "ünï", "last"]
    (entry,) = map(json.loads, (tmp_path / "o.skipped.jsonl").read_text().splitlines())
    assert entry["where"].endswith("row 1") and entry["reason"] == "invalid UTF-8: field 'text' at byte 4"
    assert json.loads(entry["raw"])["text"] == "bad \\xff\\xfe"
    assert tokenize(*args, "--overwrite", "--on-error", "skip", "--text-field", "when") == 2


def test_of_a_saved_dataset_its_own_files_are_read(tmp_path, model, capsys):
    """Not what `map` has left beside them, and none too few."""
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"), num_shards=2)
    datasets.load_from_disk(str(tmp_path / "saved")).map(lambda row: {"text": row["text"].upper()})
    assert list((tmp_path / "saved").glob("cache-*.arrow"))
    args = ("--input", tmp_path / "saved", "--tokenizer", model, "--output", tmp_path / "o")
    assert tokenize(*args) == 0
    assert decoded(tmp_path / "o", model) == TEXTS
    (tmp_path / "saved/data-00001-of-00002.arrow").unlink()
    assert tokenize(*args, "--overwrite") == 2
    assert "data-00001-of-00002.arrow: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["b.jsonl.gz", "b.jsonl.zst", "b.txt.gz"])
def test_an_archive_that_never_arrived(tmp_path, model, capsys, name):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    (tmp_path / name).touch()
    inputs = (tmp_path / "a.jsonl", tmp_path / name)
    assert tokenize("--input", *inputs, "--tokenizer", model, "--output", tmp_path / "o") == 2
    assert f"{name}: file ends before its compressed data does" in capsys.readouterr().err


def test_a_file_name_that_is_no_utf8_is_one_line(tmp_path, model, capsys):
    path = os.fsencode(tmp_path) + b"/caf\xe9.jsonl"
    with open(path, "w") as file:
        file.write('{"text": "x"}')
    assert tokenize("--input", tmp_path, "--tokenizer", model, "--output", tmp_path / "o") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "caf\\xe9.jsonl" in error and "rename" in error


def test_an_archive_with_a_damaged_byte_is_reported(tmp_path):
    """Wherever the byte is: in the header, in compressed blocks, in the checksum."""
    lines = b"".join(b'{"text": "%d"}\n' % (i * i) for i in range(500))
    whole = gzip.compress(lines, mtime=0)
    path = tmp_path / "a.jsonl.gz"
    for at in range(0, len(whole), 3):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        records = list(readers.read_records(Slice(str(path), 0, len(whole)), field_extractor("text")))
        good = [record.text for record in records if not record.problem]
        assert len(good) < len(records) or good == [str(i * i) for i in range(500)], at


def test_stdin(tmp_path, model, monkeypatch):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    for _ in range(2):  # the second run finds it complete: the content decides, not the time
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
        assert tokenize("--input", "-", "--tokenizer", model, "--output", tmp_path / "o") == 0
    assert decoded(tmp_path / "o", model) == TEXTS
    assert not (tmp_path / "o.spool").exists()


def test_a_hub_dataset_is_streamed(tmp_path, model, monkeypatch, capsys):
    import datasets

    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return iter([{"text": text} for text in TEXTS])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    args = ("--tokenizer", model, "--output", tmp_path / "o")
    assert tokenize("--input", "hub:some/set:en:test", *args) == 0
    assert asked == [(("some/set", "en"), {"split": "test", "streaming": True})]
    assert decoded(tmp_path / "o", model) == TEXTS
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: 1 / 0)
    assert tokenize("--input", "hub:other/set", *args) == 2
    assert "cannot be streamed" in capsys.readouterr().err


def test_a_hub_stream_that_breaks_off_is_not_the_end_of_the_corpus(tmp_path, model, monkeypatch, capsys):
    import datasets

    class PayloadError(Exception):
        """As aiohttp's: no OSError."""

    for error in (ConnectionError("reset by peer"), PayloadError("reset by peer"), TimeoutError("reset by peer")):

        def broken(*_, error=error, **__):
            yield {"text": TEXTS[0]}
            raise error

        args = ("--input", "hub:some/set", "--tokenizer", model, "--output", tmp_path / "o")
        monkeypatch.setattr(datasets, "load_dataset", broken)
        for _ in range(2):  # what arrived is not taken for the whole by the next run either
            assert tokenize(*args) == 2
            message = capsys.readouterr().err
            assert "broke off after 1 records: reset by peer" in message and message.count("\n") == 1
            assert not list(tmp_path.glob("o.*x"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"text": text} for text in TEXTS]))
    assert tokenize(*args) == 0
    assert decoded(tmp_path / "o", model) == TEXTS


def test_order_of_files_and_pieces(tmp_path):
    for name in ("x_10.jsonl", "x_2.jsonl", "y.txt"):
        (tmp_path / name).write_text("x")
    want = [str(tmp_path / name) for name in ("x_2.jsonl", "x_10.jsonl", "y.txt")]
    assert expand([str(tmp_path)]) == expand([str(tmp_path / "*")]) == want
    assert sorted(["a10b", "a9b"], key=natural) == ["a9b", "a10b"]


def test_no_folder_is_passed_over_in_silence(tmp_path, monkeypatch):
    for name in ("in/a.jsonl", "in/deep/b.jsonl", "elsewhere/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/round").symlink_to(tmp_path / "in")
    want = [str(tmp_path / "in" / name) for name in ("a.jsonl", "deep/b.jsonl", "link/c.jsonl")]
    assert expand([str(tmp_path / "in")]) == expand([str(tmp_path / "in/[adl]*")]) == want
    (tmp_path / "in/round").unlink()
    assert expand([str(tmp_path / "in/**")]) == want
    real = os.scandir

    def refusing(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(UserError, match="deep cannot be read: Permission denied"):
        expand([str(tmp_path / "in")])


def test_one_file_spelled_in_two_ways_is_named_twice(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("x")
    monkeypatch.chdir(tmp_path)
    for names in (["a.jsonl", "./a.jsonl"], [str(tmp_path), "a.jsonl"], ["*.jsonl", str(tmp_path / "*")]):
        with pytest.raises(UserError, match="named twice"):
            expand(names)


@settings(max_examples=50)
@given(sizes=st.lists(st.integers(0, 10**9), min_size=1, max_size=10), splittable=st.booleans())
def test_pieces_cover_every_byte_once_in_order(sizes, splittable):
    files = [(f"{i}.{'jsonl' if splittable else 'txt'}", size) for i, size in enumerate(sizes)]
    slices = [part for piece in work_units(files) for part in piece]
    for path, size in files:
        mine = [part for part in slices if part.path == path]
        assert [part.start for part in mine] == [0, *(part.stop for part in mine[:-1])] and mine[-1].stop == size
        assert len(mine) == 1 or splittable and all(part.stop - part.start <= LARGEST_UNIT for part in mine)
    assert [part.path for part in slices] == sorted((part.path for part in slices), key=natural)


def test_templates():
    extract = template_extractor("Q: {question} A: {answers.text.0} {{{n}}}")
    assert extract({"question": "why", "answers": {"text": ["so", "no"]}, "n": 3}) == "Q: why A: so {3}"
    for record, message in (
        ({"question": "why", "n": 1}, "no field 'answers.text.0'"),
        ({"question": "why", "answers": {"text": []}, "n": 1}, "the list has 0 entries"),
        ({"question": None, "answers": {"text": ["x"]}, "n": 1}, "not a text but a NoneType"),
    ):
        with pytest.raises(ValueError, match=message):
            extract(record)


def test_template_on_the_command_line(tmp_path, model, capsys):
    (tmp_path / "in.jsonl").write_text(json.dumps({"a": {"b": "x"}, "c": "y"}) + "\n")
    args = ("--input", tmp_path / "in.jsonl", "--tokenizer", model, "--output", tmp_path / "o")
    assert tokenize(*args, "--template", "{a.b}\\n{c}") == 0
    assert decoded(tmp_path / "o", model) == ["x\ny"]
    assert tokenize(*args, "--template", "{a.b}", "--text-field", "c") == 2
    assert "exclude each other" in capsys.readouterr().err
    assert tokenize(*args, "--template", "no field") == 2


def test_the_fast_twin_of_a_trained_model_gives_its_ids(model, speeches):
    reference = load_tokenizer(model)
    fast_backend = fast.fast_backend_of(reference, model)
    runs = [c * n for c in (" ", "a", "\n", "-", "\t", "ab") for n in (1, 2, 3, 7, 14, 15, 16, 17, 31, 64, 255)]
    assert fast.difference(reference, fast_backend, [*speeches[:20], *HARD_TEXTS, *runs]) == ""


@settings(max_examples=200)
@given(text=st.text(min_size=1))
def test_the_fast_twin_on_any_text(model, text):
    reference = load_tokenizer(model)
    assert fast.difference(reference, fast.fast_backend_of(reference, model), [text]) == ""


def test_text_that_spells_a_special_token_is_text(tmp_path, gpt2_like):
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps({"text": "a <|endoftext|> b"}) + "\n")
    args = ("--input", source, "--tokenizer", gpt2_like, "--append-eod")
    for backend in ("auto", "reference"):
        assert tokenize(*args, "--output", tmp_path / backend, "--backend", backend) == 0
        ids = IndexedReader(tmp_path / backend).document(0).tolist()
        assert ids.count(0) == 1 and ids[-1] == 0
    assert tokenize(*args, "--output", tmp_path / "allowed", "--allow-special") == 0
    assert IndexedReader(tmp_path / "allowed").document(0).tolist().count(0) == 2


def test_both_backends_write_the_same_bytes_and_say_who_ran(tmp_path, gpt2_like, capsys):
    args = ("--input", SAMPLE, "--tokenizer", gpt2_like, "--append-eod")
    for backend, said in (("auto", "fastokens"), ("reference", "s, tokenizers ")):
        assert tokenize(*args, "--output", tmp_path / backend, "--backend", backend) == 0
        assert said in capsys.readouterr().out
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"auto{ending}").read_bytes() == (tmp_path / f"reference{ending}").read_bytes()


def test_truncation_and_padding_in_a_tokenizer_file_are_not_for_a_corpus(tmp_path, gpt2_like):
    """Beyond the length of the texts on which the fast library proves itself."""
    import tokenizers

    asking = tokenizers.Tokenizer.from_file(gpt2_like)
    asking.enable_truncation(2048)
    asking.enable_padding(length=4096)
    asking.save(str(tmp_path / "asking.json"))
    for tokenizer in (gpt2_like, tmp_path / "asking.json"):
        args = ("--input", SAMPLE, "--tokenizer", tokenizer, "--output", tmp_path / f"o_{Path(tokenizer).stem}")
        assert tokenize(*args) == 0
    assert (tmp_path / "o_asking.bin").read_bytes() == (tmp_path / "o_tokenizer.bin").read_bytes()


class Liar(Tokenizer):
    """A fast library that is wrong about one character."""

    library, vocab_size, digest = "liar", 5000, ""

    def __init__(self, reference):
        self.reference = reference

    def encode_batch(self, texts):
        return self.reference.encode_batch([text.replace("\u00bd", "1/2") for text in texts])

    def token_id(self, token): ...
    def decode(self, ids, skip_special_tokens=False): ...
    def encode_with_bytes(self, text): ...


def test_a_fast_library_that_differs_is_not_used(tmp_path, gpt2_like, monkeypatch, capsys):
    monkeypatch.setattr(fast, "fast_backend_of", lambda reference, *_: Liar(reference))
    args = ("--input", SAMPLE, "--tokenizer", gpt2_like, "--output", tmp_path / "o")
    assert tokenize(*args) == 0
    assert "is not used: it gives other ids for" in capsys.readouterr().out
    assert json.loads((tmp_path / "o.json").read_text())["tokenizer"]["library"].startswith("tokenizers ")


def test_tiktoken_files(tmp_path, capsys):
    """Llama-3's form: base64 tokens with ranks, special tokens after them."""
    import base64

    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" the"]
    path = tmp_path / "tokenizer.model"
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.library.startswith("tiktoken") and tokenizer.eod == 260 and tokenizer.vocab_size == 261
    ids, counts = tokenizer.encode_batch(["the the", "<|end_of_text|>"])
    assert ids[:2].tolist() == [257, 258] and counts.tolist() == [2, 15] and ids.max() < 259
    source = tmp_path / "in.txt"
    source.write_text("the <|end_of_text|> the")
    assert tokenize("--input", source, "--tokenizer", path, "--output", tmp_path / "o", "--append-eod") == 0
    assert IndexedReader(tmp_path / "o").document(0).tolist().count(260) == 1


def test_tokenizers_that_are_none(tmp_path, capsys):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "in.txt").write_text("x")
    for name, message in (
        (tmp_path / "tokenizer.json", "is not a tokenizer.json"),
        (tmp_path / "nothing", "does not exist"),
        ("tiktoken:no_such_encoding", "no_such_encoding"),
    ):
        assert tokenize("--input", tmp_path / "in.txt", "--tokenizer", name, "--output", tmp_path / "o") == 2
        assert message in capsys.readouterr().err


def test_special_tokens_are_visible_in_decoded_text(gpt2_like):
    tokenizer = load_tokenizer(gpt2_like)
    ids = tokenizer.encode_batch(["hello"])[0].tolist()
    assert tokenizer.decode([*ids, 0, 0]) == "hello<|endoftext|><|endoftext|>"
    assert np.asarray(ids).max() < tokenizer.vocab_size
