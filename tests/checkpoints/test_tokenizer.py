"""A converted sentencepiece model gives the same ids, through transformers too; what would not is refused."""

import base64
import json

import pytest
import sentencepiece
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from checkpoints.tokenizer import assert_same_ids, convert_sentencepiece, special_tokens, write_tokenizer
from megatron_taipan.data_config import DataConfig
from megatron_taipan.errors import UserError
from megatron_taipan.tokenizer.byte_level import byte_letters
from megatron_taipan.tokenizer.hard_texts import hostile_texts
from megatron_taipan.tokenizer.load import load_tokenizer_file
from megatron_taipan.tokenizer.tiktoken_file import LLAMA3_PATTERN
from tests.checkpoints.made import MANIFEST, lines_of_text, train_sentencepiece


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    return train_sentencepiece(tmp_path_factory.mktemp("spm"))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"byte_fallback": False},
        {"remove_extra_whitespaces": True},
        {"pad_id": 3, "bos_id": -1},
    ],
)
def test_ids_are_equal_on_real_and_hostile_text(tmp_path, options):
    file = train_sentencepiece(tmp_path, **options)
    tokenizer, reference = convert_sentencepiece(file), load_tokenizer_file(file)
    special = special_tokens(file, reference)
    texts = lines_of_text()
    texts += ["\n".join(texts[at : at + 50]) for at in range(0, len(texts), 50)]
    assert assert_same_ids(file, reference, tokenizer, texts) == len(texts) + len(hostile_texts())
    assert ("pad_token" in special, "bos_token" in special) == ("pad_id" in options, "bos_id" not in options)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=80))
def test_ids_are_equal_on_any_text(model_file, text):
    converted = getattr(test_ids_are_equal_on_any_text, "converted", None) or convert_sentencepiece(model_file)
    test_ids_are_equal_on_any_text.converted = converted
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    assert converted.encode(text, add_special_tokens=False).ids == reference.encode(text)


def test_auto_tokenizer_encodes_and_decodes_alike(tmp_path, model_file):
    special = write_tokenizer(model_file, tmp_path, lines_of_text()[:50], 128)
    assert special.settings == {"eos_token_id": 2, "pad_token_id": 2}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    for text in hostile_texts() + lines_of_text()[:300]:
        ids = reference.encode(text)
        assert tokenizer(text, split_special_tokens=True)["input_ids"] == ids
        if "\x00" not in text:
            assert tokenizer.decode(ids).removeprefix(" ") == reference.decode(ids)
            assert load_tokenizer_file(tmp_path / "tokenizer.json").decode(
                ids, skip_special_tokens=True
            ) == reference.decode(ids)
    padded = tokenizer(["a", "a longer text"], padding=True)
    assert padded["attention_mask"][0][0] == 0 and padded["attention_mask"][0][-1] == 1  # on the left
    assert tokenizer.eos_token_id == 2 and tokenizer.model_max_length == 128
    assert tokenizer.decode([2, *reference.encode("text")], skip_special_tokens=True).strip() == "text"


@pytest.mark.parametrize(
    "options", [{"normalization_rule_name": "nmt_nfkc"}, {"model_type": "unigram", "normalization_rule_name": "nfkc"}]
)
def test_a_model_that_cannot_be_converted_exactly_is_refused(tmp_path, options):
    # the tokenizers library applies such rules to grapheme clusters, sentencepiece does not
    file = train_sentencepiece(tmp_path, **options)
    with pytest.raises(UserError, match="gives other ids"):
        write_tokenizer(file, tmp_path / "out", [], 128)
    assert not (tmp_path / "out").exists()


def test_a_wrong_conversion_is_noticed(model_file):
    tokenizer = convert_sentencepiece(model_file)
    tokenizer.normalizer = None
    with pytest.raises(UserError, match="gives other ids"):
        assert_same_ids(model_file, load_tokenizer_file(model_file), tokenizer, [])


def test_what_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tok.model").write_bytes(b"\xff\xffnot a model")
    with pytest.raises(UserError, match="is not a sentencepiece model"):
        write_tokenizer(tmp_path / "tok.model", tmp_path, [], 1)
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(UserError, match="vocab.txt is not a sentencepiece model"):
        write_tokenizer(tmp_path / "vocab.txt", tmp_path, [], 1)


def test_a_tokenizers_file_is_taken_as_it_is(tmp_path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator(lines_of_text()[:500], trainer)
    tokenizer.save(str(tmp_path / "source.json"))
    special = write_tokenizer(tmp_path / "source.json", tmp_path / "out", [], 64)
    assert special.settings["eos_token_id"] == tokenizer.token_to_id("<|endoftext|>")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    tokenizer.encode_special_tokens = True
    for text in lines_of_text()[:100] + ["literal <|endoftext|> text"]:
        assert loaded(text, split_special_tokens=True)["input_ids"] == tokenizer.encode(text).ids
    tokenizer.encode_special_tokens = False
    assert loaded("literal <|endoftext|> text")["input_ids"] == tokenizer.encode("literal <|endoftext|> text").ids


def test_user_defined_pieces_that_the_libraries_treat_differently_are_refused(tmp_path):
    """No text of the data need hold them; sentencepiece puts no space before the text behind one, tokenizers does."""
    (tmp_path / "with").mkdir()
    file = train_sentencepiece(tmp_path / "with", user_defined_symbols="<sep>")
    with pytest.raises(UserError, match="gives other ids for '<sep>'"):
        write_tokenizer(file, tmp_path / "out", [], 128)
    (tmp_path / "without").mkdir()
    file = train_sentencepiece(tmp_path / "without", user_defined_symbols="<sep>", add_dummy_prefix=False)
    write_tokenizer(file, tmp_path / "out", [], 128)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a<sep>b")["input_ids"] == reference.encode("a<sep>b")


def test_a_tokenizers_file_that_cuts_and_fills_up_is_used_without_either(tmp_path):
    """As the data is tokenized; a prompt would else be cut, or be filled up with padding."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<pad>"], show_progress=False)
    tokenizer.train_from_iterator(lines_of_text()[:500], trainer)
    text = " ".join(lines_of_text()[:40])
    wanted = [tokenizer.encode(words).ids for words in ("def", text)]
    tokenizer.enable_truncation(32)
    tokenizer.enable_padding(length=8, pad_token="<pad>")
    tokenizer.save(str(tmp_path / "source.json"))
    loaded = load_tokenizer_file(tmp_path / "source.json")
    assert [loaded.encode(words) for words in ("def", text)] == wanted
    write_tokenizer(tmp_path / "source.json", tmp_path / "out", [], 64)
    exported = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    assert [exported.encode(words).ids for words in ("def", text)] == wanted


def write_tiktoken(path, vocabulary: int = 700):
    """Ranks from a byte-level tokenizer trained on this repository's text, which joins in the order of its ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(lines_of_text(), trainer)
    letters = {letter: byte for byte, letter in byte_letters().items()}
    assert set(letters) == set(alphabet)
    by_rank = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    lines = [f"{base64.b64encode(bytes(letters[c] for c in token)).decode()} {rank}" for token, rank in by_rank]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_tiktoken_files_are_converted_exactly(tmp_path):
    file = write_tiktoken(tmp_path / "tokenizer.model")
    texts = lines_of_text()
    special = write_tokenizer(file, tmp_path / "out", texts, 128)
    assert special.settings == {"eos_token_id": 701, "pad_token_id": 701}
    loaded, codec = AutoTokenizer.from_pretrained(tmp_path / "out"), load_tokenizer_file(file)
    for text in hostile_texts() + texts[:500]:
        assert loaded(text, split_special_tokens=True)["input_ids"] == codec.encode(text)
        assert loaded.decode(codec.encode(text)) == text


def test_a_damaged_tiktoken_file_is_refused(tmp_path):
    file = write_tiktoken(tmp_path / "tokenizer.model")
    file.write_text(file.read_text() + "not base64!\n")
    with pytest.raises(UserError, match="line 701 is not a base64"):
        write_tokenizer(file, tmp_path / "out", [], 128)


def test_special_tokens_named_beside_a_tokenizers_file_are_used(tmp_path):
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<stop>": 1, "</s>": 2}, "a"))
    tokenizer.add_special_tokens(["<stop>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    assert write_tokenizer(tmp_path / "tokenizer.json", tmp_path / "out", [], 64).settings["eos_token_id"] == 1
    assert load_tokenizer_file(tmp_path / "tokenizer.json").end_ids == (1,)


def test_an_ordinary_piece_is_no_special_token_and_the_data_decides_between_two(tmp_path):
    """Shaped as Gemma's: the tag `</s>` is text. Another token that may end a text is Qwen's."""
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1, "<eos>": 2, "<|im_end|>": 3, "<pad>": 4}, "a"))
    tokenizer.add_tokens(["</s>"])
    tokenizer.add_special_tokens(["<eos>"])
    source = tmp_path / "tokenizer.json"
    tokenizer.save(str(source))
    assert write_tokenizer(source, tmp_path / "out", [], 64).settings == {"eos_token_id": 2, "pad_token_id": 2}
    assert load_tokenizer_file(source).end_ids == (2,)
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(source))
    with pytest.raises(UserError, match=r"'<eos>' \(id 2\) and '<\|im_end\|>' \(id 3\).*tokenizer_config.json"):
        write_tokenizer(source, tmp_path / "two", [], 64)
    said = MANIFEST | {"shards": [{"prefix": "text"}], "options": {"bos": None, "eod": 3}}
    (tmp_path / "text.json").write_text(json.dumps(said))
    data = DataConfig.model_validate({"train": str(tmp_path / "text")})
    assert write_tokenizer(source, tmp_path / "three", [], 64, data=data).settings["eos_token_id"] == 3
    assert AutoTokenizer.from_pretrained(tmp_path / "three").eos_token == "<|im_end|>"
