"""Every form of tokenizer against the libraries that own it: transformers, tiktoken, sentencepiece."""

import base64
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from tiktoken.load import load_tiktoken_bpe
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter, bytes_to_unicode

from checkpoints.tokenizer import convert_sentencepiece, write_tokenizer
from data_prep import cli
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.errors import UserError
from megatron_taipan.inference.text import model_tokenizer
from megatron_taipan.tokenizer.byte_level import byte_letters
from megatron_taipan.tokenizer.hard_texts import HARD_TEXTS, hostile_texts
from megatron_taipan.tokenizer.load import load_tokenizer, load_tokenizer_file
from megatron_taipan.tokenizer.sentencepiece_model import UNKNOWN, read_proto
from megatron_taipan.tokenizer.tiktoken_file import LLAMA3_PATTERN, read_ranks
from tests.checkpoints.made import train_sentencepiece

TOKENS = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the"]


def tiktoken_file(path: Path, lines: list[bytes] | None = None) -> Path:
    """A tiktoken file of TOKENS, or of other lines."""
    lines = lines or [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(TOKENS)]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def test_the_split_pattern_and_the_letters_of_bytes_are_those_of_transformers():
    assert inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default == LLAMA3_PATTERN
    assert byte_letters() == bytes_to_unicode()


def test_a_tiktoken_file_is_read_as_tiktoken_reads_it(tmp_path):
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(TOKENS)]
    for number, ending in enumerate((b"\n", b"\r\n", b"\n\n")):  # empty lines count for nothing
        file = tmp_path / f"{number}.model"
        file.write_bytes(ending.join(lines) + ending)
        assert read_ranks(file) == load_tiktoken_bpe(str(file)) == {token: i for i, token in enumerate(TOKENS)}


def test_a_token_that_is_not_base64_is_refused_where_tiktoken_takes_it_for_another(tmp_path):
    lines = tiktoken_file(tmp_path / "good").read_bytes().splitlines()
    file = tiktoken_file(tmp_path / "bad", [*lines[:258], b"IH!RoZQ== 258"])
    assert load_tiktoken_bpe(str(file))[b" the"] == 258
    for load in (load_tokenizer, load_tokenizer_file):
        with pytest.raises(UserError, match="line 259 is not a base64 token and a rank"):
            load(str(file))


@pytest.mark.parametrize("last", [b"dGg= 258", b"IHRoZQ== 259", b"IHRoZQ== 257"])
def test_ranks_that_leave_no_ids_for_the_special_tokens_are_refused(tmp_path, last):
    lines = tiktoken_file(tmp_path / "good").read_bytes().splitlines()
    with pytest.raises(UserError, match="its? .*ranks are not 0 to|their ranks are not 0 to"):
        load_tokenizer(str(tiktoken_file(tmp_path / "bad", [*lines[:258], last])))


def test_text_without_special_tokens_is_what_transformers_decodes(tmp_path):
    """Of a tiktoken file too, whose own library shows them; ids of a padded vocabulary are left out."""
    (tmp_path / "sp").mkdir()
    for file in (tiktoken_file(tmp_path / "tokenizer.model"), train_sentencepiece(tmp_path / "sp")):
        ours, out = load_tokenizer_file(file), tmp_path / f"hf{file.stem}"
        write_tokenizer(file, out, [], 128)
        theirs = AutoTokenizer.from_pretrained(out)
        ids = [ours.bos, *ours.encode("the text"), ours.eod]
        wanted = theirs.decode(ids, skip_special_tokens=True).removeprefix(" ")
        assert wanted == "the text" == ours.decode([*ids, 100_000], skip_special_tokens=True)
        assert load_tokenizer_file(out / "tokenizer.json").decode(ids, skip_special_tokens=True) == wanted
        begin, end = theirs.convert_ids_to_tokens([ours.bos, ours.eod])
        assert ours.decode(ids) == f"{begin}the text{end}"


def test_the_unknown_piece_of_a_sentencepiece_model_is_known_by_its_type(tmp_path):
    """And not by the spelling in the options, which sentencepiece does not look for either."""
    proto = read_proto(train_sentencepiece(tmp_path, byte_fallback=False))
    (unknown,) = (piece for piece in proto.pieces if piece.type == UNKNOWN)
    unknown.piece = "<other>"
    assert proto.trainer_spec.unk_piece == "<unk>"
    file = tmp_path / "tokenizer.model"
    file.write_bytes(proto.SerializeToString())
    reference, converted = sentencepiece.SentencePieceProcessor(model_file=str(file)), convert_sentencepiece(file)
    assert reference.unk_id() in reference.encode("漢")
    for text in [*HARD_TEXTS, *hostile_texts()]:
        assert converted.encode(text, add_special_tokens=False).ids == reference.encode(text), text
    assert load_tokenizer(str(file)).roles["unk_token"].candidates == {reference.unk_id(): "<other>"}


def test_data_generation_and_export_agree_on_what_ends_a_document(tmp_path):
    """The configuration beside a sentencepiece model or a tiktoken file counts for all of them, and it may say that
    there is none."""
    piece = train_sentencepiece(tmp_path)
    rank = tiktoken_file(tmp_path / "ranks.model")
    for number, (source, said, end) in enumerate([
        (piece, None, "</s>"), (piece, {"eos_token": "</s>"}, "</s>"), (piece, {"eos_token": None}, None),
        (rank, None, "<|end_of_text|>"), (rank, {"eos_token": "<|begin_of_text|>"}, "<|begin_of_text|>"),
        (rank, {"eos_token": None}, None),
    ]):  # fmt: skip
        folder = tmp_path / str(number)
        folder.mkdir()
        file = Path(shutil.copy(source, folder / "tokenizer.model"))
        if said is not None:
            (folder / "tokenizer_config.json").write_text(json.dumps(said))
        data, ours = load_tokenizer(str(folder)), model_tokenizer(file)
        wanted = None if end is None else data.token_id(end)
        assert (data.eod, ours.end_ids) == (wanted, () if wanted is None else (wanted,))
        special = write_tokenizer(file, folder / "hf", [], 128)
        assert special.tokens.get("eos_token") == end == AutoTokenizer.from_pretrained(folder / "hf").eos_token


def test_what_data_is_tokenized_with_can_be_loaded_for_generation(tmp_path):
    """Its name may end in anything; what it holds says what it is."""
    for file in (train_sentencepiece(tmp_path), tiktoken_file(tmp_path / "ranks.model")):
        renamed = Path(shutil.copy(file, tmp_path / f"{file.stem}.spm"))
        (tmp_path / "in.txt").write_text("the text")
        arguments = ["--input", tmp_path / "in.txt", "--tokenizer", renamed, "--output", tmp_path / file.stem]
        assert cli.main(["tokenize", *map(str, arguments)]) == 0
        ids = IndexedReader(tmp_path / file.stem).document(0).tolist()
        assert model_tokenizer(renamed).decode(ids, skip_special_tokens=True) == "the text"


def test_a_file_is_read_whatever_the_encoding_of_its_path(tmp_path):
    """Libraries take every name as UTF-8, so in a Latin-1 locale they look for another file."""
    (place := Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))).mkdir()
    piece = train_sentencepiece(tmp_path)
    convert_sentencepiece(piece).save(str(tmp_path / "tokenizer.json"))
    for file in (piece, tmp_path / "tokenizer.json", tiktoken_file(tmp_path / "ranks.model")):
        copy = Path(shutil.copy(file, place))
        assert load_tokenizer_file(copy).encode("the text") == load_tokenizer_file(file).encode("the text")


def test_a_fast_library_that_fails_on_a_text_is_not_used(tmp_path, capsys):
    """A byte-level vocabulary without some bytes: fastokens raises an error, the reference leaves them out."""
    made = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "in.txt").write_text("abc")
    arguments = ["--input", tmp_path / "in.txt", "--tokenizer", tmp_path / "tokenizer.json", "--output", tmp_path / "o"]
    assert cli.main(["tokenize", *map(str, arguments)]) == 0
    assert "is not used: it fails on " in capsys.readouterr().out
    assert IndexedReader(tmp_path / "o").document(0).tolist() == [0, 1]


def test_data_preparation_imports_no_torch():
    program = "import sys, data_prep.cli, data_prep.commands.tokenize; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
