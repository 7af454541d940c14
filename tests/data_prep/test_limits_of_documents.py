"""The largest record and document, and what is counted of those that are left out, in short texts and in chunks."""

import json

import numpy as np
import pytest
import sentencepiece

from data_prep import cli, long_text, readers
from data_prep.extract import field_extractor
from data_prep.kinds import records
from data_prep.kinds.records import Slice
from data_prep.limits import Limits
from data_prep.long_text import BrokenText
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.tokenizer.sentencepiece_model import SentencePieceTokenizer


def in_chunks(monkeypatch, size):
    """Texts of more than `size` bytes are read in chunks of so many."""
    monkeypatch.setattr(records, "LONG", size)
    for name in ("LONG_STRING", "READ_BYTES"):
        monkeypatch.setattr(long_text, name, size)
    monkeypatch.setattr(records, "READ_BYTES", size)


def tokenize(*args) -> int:
    return cli.main(["tokenize", *map(str, args)])


def lines(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.mark.parametrize("letter", ["a", "\u00e9"])
@pytest.mark.parametrize("name", ["x.txt", "x.parquet"])
def test_the_largest_record_is_that_of_all_its_chunks(tmp_path, monkeypatch, name, letter):
    """No chunk is too large by itself, so only their sum can tell."""
    text, path = letter * 1000, tmp_path / name
    if name == "x.parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"text": [text]}), path)
    else:
        path.write_text(text, encoding="utf-8")
    in_chunks(monkeypatch, 100)
    size = len(text.encode())

    def read(limit):
        found = readers.read_records(Slice(str(path), 0, 1), field_extractor("text"), limits=Limits(limit))
        return "".join(next(found).chunks or ())

    assert read(size) == text
    with pytest.raises(BrokenText, match="record too large"):
        read(size - 1)


@pytest.mark.parametrize("chunk", [1 << 20, 40])
def test_a_document_longer_than_the_format_holds_is_refused(tmp_path, model, monkeypatch, capsys, chunk):
    """Lengths are int32, and a longer one would become negative without a word."""
    text = "the state of the union is strong " * 6
    tokens = len(sentencepiece.SentencePieceProcessor(model_file=model).encode(text)) + 1  # and EOD
    in_chunks(monkeypatch, chunk)
    args = ("--input", lines(tmp_path / "x.jsonl", [text]), "--tokenizer", model, "--append-eod")
    monkeypatch.setattr("data_prep.parts.MAX_SEQUENCE", tokens - 1)
    assert tokenize(*args, "--output", tmp_path / "o") == 2
    assert f"a document of {tokens} tokens; the format holds {tokens - 1}" in capsys.readouterr().err
    monkeypatch.setattr("data_prep.parts.MAX_SEQUENCE", tokens)
    assert tokenize(*args, "--output", tmp_path / "o") == 0
    assert IndexedReader(tmp_path / "o").n_tokens == tokens


@pytest.mark.parametrize("chunk", [1 << 20, 40])
def test_of_documents_left_out_neither_a_token_nor_a_byte_is_counted(tmp_path, model, monkeypatch, chunk):
    """Also where BOS and EOD would have made a document of nothing."""
    real = SentencePieceTokenizer.encode_batch
    monkeypatch.setattr(  # as tokenizers that strip white space do
        SentencePieceTokenizer, "encode_batch", lambda self, texts: real(self, [text.strip() for text in texts])
    )
    in_chunks(monkeypatch, chunk)
    kept = ["na\u00efve words " * 9, "short"]
    source = lines(tmp_path / "x.jsonl", [kept[0], " " * 300, kept[1], "\n " * 99])
    args = ("--input", source, "--tokenizer", model, "--output", tmp_path / "o", "--backend", "reference")
    assert tokenize(*args, "--on-error", "skip", "--append-eod", "--prepend-bos") == 0
    reader, said = IndexedReader(tmp_path / "o"), json.loads((tmp_path / "o.json").read_text())
    assert reader.n_documents == said["documents"] == 2 and min(map(np.size, map(reader.document, range(2)))) > 2
    assert said["skipped"]["reasons"] == {"document without tokens": 2}
    assert said["text_bytes"] == sum(len(text.encode()) for text in kept)


def test_the_bytes_of_questions_without_an_answer_are_not_counted(tmp_path, model):
    """They give no document: bytes by tokens would be those of another corpus."""
    rows = [{"q": "a question " * 5, "a": "yes"}, {"q": "another " * 50, "a": ""}, {"q": "and a third", "a": "no"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    template = "{q}{% generation %}{a}{% endgeneration %}"
    args = ("--input", tmp_path / "x.jsonl", "--tokenizer", model, "--output", tmp_path / "o", "--template", template)
    assert tokenize(*args, "--on-error", "skip") == 0
    said = json.loads((tmp_path / "o.json").read_text())
    assert said["documents"] == 2
    assert said["text_bytes"] == sum(len(row["q"] + row["a"]) for row in (rows[0], rows[2]))
