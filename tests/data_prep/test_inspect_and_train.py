"""`inspect` and `train-tokenizer`."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep import cli
from megatron_taipan.data.indexed import IndexedWriter

ROOT = Path(__file__).parents[2]
SAMPLE = str(ROOT / "data_prep/sample/state_of_the_union.jsonl.gz")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("model") / "tok.model")
    assert cli.main(["train-tokenizer", "--input", SAMPLE, "--output", path, "--vocab-size", "700"]) == 0
    return path


def test_the_tokenizer_has_the_size_asked_for_and_is_the_same_each_time(model, tmp_path):
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    assert processor.vocab_size() == 700
    assert (processor.unk_id(), processor.bos_id(), processor.eos_id()) == (0, 1, 2)
    again = str(tmp_path / "again.model")
    assert cli.main(["train-tokenizer", "--input", SAMPLE, "--output", again, "--vocab-size", "700"]) == 0
    assert Path(again).read_bytes() == Path(model).read_bytes()


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_comes_back(model, text):
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    assert processor.decode(processor.encode(text)) == text.replace("\u2581", " ")


def test_too_large_a_vocabulary_is_one_line(tmp_path, capsys):
    small = tmp_path / "a.txt"
    small.write_text("only a few words")
    out = tmp_path / "t.model"
    assert cli.main(["train-tokenizer", "--input", str(small), "--output", str(out), "--vocab-size", "5000"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "--vocab-size 5000" in error and re.search(r"<= ?\d+", error)
    assert not out.exists()
    assert cli.main(["train-tokenizer", "--input", str(small), "--output", str(out), "--vocab-size", "100"]) == 2
    assert "between 354" in capsys.readouterr().err


def test_long_lines_of_any_script_are_learned_from(tmp_path):
    """2,000 Chinese characters are 6,000 bytes."""
    source, out = tmp_path / "a.jsonl", tmp_path / "t.model"
    words = ["\u4e2d\u6587", "\u8bed\u8a00", "\u6a21\u578b", "\u8bad\u7ec3"]
    text = "".join(words[i * i % 7 % 4] for i in range(2000))
    source.write_text((json.dumps({"text": text}) + "\n") * 3)
    assert cli.main(["train-tokenizer", "--input", str(source), "--output", str(out), "--vocab-size", "368"]) == 0
    processor = sentencepiece.SentencePieceProcessor(model_file=str(out))
    assert len(processor.encode(text)) < len(text) / 1.9


def test_broken_records_in_training(tmp_path, model, capsys):
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({"text": "some words to learn from " * 50}) + "\n{\n")
    args = ["train-tokenizer", "--input", str(source), "--output", str(tmp_path / "t.model"), "--vocab-size", "360"]
    assert cli.main(args) == 2 and "broken JSON" in capsys.readouterr().err
    assert cli.main([*args, "--on-error", "skip"]) == 0 and "1 broken records left out" in capsys.readouterr().out


def test_a_reader_that_has_enough(tmp_path):
    """`inspect ... | head` ends in silence."""
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        for _ in range(5000):
            writer.add_document(list(range(60)))
    command = [sys.executable, "-m", "data_prep", "inspect", tmp_path / "x", "--documents", "5000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline().startswith(str(tmp_path / "x").encode())
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 141


def test_inspect_shows_special_tokens_and_lengths(tmp_path, model, capsys):
    processor = sentencepiece.SentencePieceProcessor(model_file=model)
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([1, *processor.encode("The union is strong"), 2, 2])
        for length in (1, 4, 5, 7):
            writer.add_document([5] * length)
    assert cli.main(["inspect", str(tmp_path / "x"), "--tokenizer", model, "--documents", "1"]) == 0
    out = capsys.readouterr().out
    assert "<s>The union is strong</s></s>" in out
    assert "5 documents" in out and "shortest 1" in out
    bars = {line.split()[0]: line.split()[3:] for line in out.splitlines() if re.match(r" +\d+ to", line)}
    # lengths 1, 4, 5, 7 and that of the sentence
    assert bars["4"] == ["3", "#" * 50] and bars["1"] == ["1", "#" * 17] and bars["2"][0] == "0"


def test_inspect_bad_input(tmp_path, model, capsys):
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document([699, 700])
    assert cli.main(["inspect", str(tmp_path / "x"), "--tokenizer", model]) == 2
    assert (
        "x.bin holds id 700 at token 1 (in document 0) and this tokenizer's vocabulary has 700"
        in capsys.readouterr().err
    )
    assert cli.main(["inspect", str(tmp_path / "x"), "--first", "9"]) == 2
    assert cli.main(["inspect", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_ctrl_c_while_the_library_trains(tmp_path):
    """The library does not hear of it before it ends: here a computation in C that would take minutes."""
    code = """
import hashlib, os, signal, threading, sentencepiece
from data_prep import cli
def train(sentence_iterator, **options):
    assert list(sentence_iterator)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)
sentencepiece.SentencePieceTrainer.train = train
cli.program()
"""
    args = ["train-tokenizer", "--input", SAMPLE, "--output", tmp_path / "t.model", "--vocab-size", "700"]
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stderr == "stopped by Ctrl-C\n"
    assert os.listdir(tmp_path) == []
