"""What tokens stand for adds up to the text, whichever library cut it, and no character goes to the wrong token."""

import base64

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from checkpoints.tokenizer import convert_sentencepiece
from megatron_taipan.tokenizer.hard_texts import hostile_texts
from megatron_taipan.tokenizer.load import load_tokenizer_file
from tests.checkpoints.made import lines_of_text, train_sentencepiece

KINDS = ("sentencepiece", "nfkc", "converted", "bytes", "lower", "tiktoken")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """One of each kind: sentencepiece models, tokenizer.json files, a tiktoken file."""
    folder = tmp_path_factory.mktemp("pieces")
    (folder / "nfkc").mkdir()
    plain = train_sentencepiece(folder)
    changing = train_sentencepiece(folder / "nfkc", normalization_rule_name="nfkc", remove_extra_whitespaces=True)
    convert_sentencepiece(plain).save(str(folder / "converted.json"))
    for name, normalizer in (
        ("bytes", None),
        ("lower", normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])),
    ):
        tokenizer = Tokenizer(models.BPE())
        if normalizer:
            tokenizer.normalizer = normalizer
        tokenizer.pre_tokenizer, tokenizer.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        # quotes behind blanks: merges of a blank with the first bytes of a character
        texts = [*lines_of_text()[:500], *["he said “yes” and “no”"] * 300]
        tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
        tokenizer.save(str(folder / f"{name}.json"))
    tokens = [bytes([byte]) for byte in range(256)] + [b" \xe2", b" \xe2\x80", b"th", b"the"]
    ranks = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_bytes(b"\n".join(ranks))
    files = (
        plain,
        changing,
        *(folder / f"{name}.json" for name in ("converted", "bytes", "lower")),
        folder / "tiktoken.model",
    )
    return {kind: load_tokenizer_file(file) for kind, file in zip(KINDS, files, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_hostile_texts_add_up(tokenizers, kind):
    for text in hostile_texts():
        ids, parts = tokenizers[kind].encode_with_bytes(text)
        assert ids == tokenizers[kind].encode(text)
        assert len(parts) == len(ids)
        assert b"".join(parts) == (text.encode() if ids else b"")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=40), kind=st.sampled_from(KINDS))
def test_parts_of_any_text_add_up(tokenizers, text, kind):
    ids, parts = tokenizers[kind].encode_with_bytes(text)
    assert len(parts) == len(ids) and b"".join(parts) == (text.encode() if ids else b"")


@pytest.mark.parametrize("kind", ["sentencepiece", "converted", "bytes", "tiktoken"])
def test_a_part_is_what_the_library_decodes_its_token_to(tokenizers, kind):
    text = "def total(self, layers):\n    return sum(layer for layer in layers)  # the sum"
    ids, parts = tokenizers[kind].encode_with_bytes(text)
    alone = [
        tokenizers[kind].decode([index], skip_special_tokens=True) for index in ids
    ]  # blanks at the front are dropped by some decoders
    assert [part.decode().strip(" ") for part in parts] == [piece.strip(" ") for piece in alone]


@pytest.mark.parametrize("kind", ["sentencepiece", "converted", "nfkc", "bytes", "tiktoken"])
def test_single_bytes_of_a_character_are_told_apart(tokenizers, kind):
    _, parts = tokenizers[kind].encode_with_bytes("x = 漢")
    assert parts[-3:] == [b"\xe6", b"\xbc", b"\xa2"]


def test_a_token_may_end_within_a_character(tokenizers):
    assert tokenizers["tiktoken"].encode_with_bytes("a “the")[1] == [b"a", b" \xe2\x80", b"\x9c", b"the"]
    parts = tokenizers["bytes"].encode_with_bytes("漢“q")[1]
    assert parts[:3] == [b"\xe6", b"\xbc", b"\xa2"] and parts[3] in (b"\xe2\x80", "“".encode())


def test_what_the_tokenizer_rewrites_stays_as_it_was_written(tokenizers):
    _, parts = tokenizers["nfkc"].encode_with_bytes("  ﬁx ½  ")
    assert b"".join(parts) == "  ﬁx ½  ".encode()
    assert sum("ﬁ".encode() in part for part in parts) == sum("½".encode() in part for part in parts) == 1
    ids, parts = tokenizers["lower"].encode_with_bytes("RETURN Self")
    assert ids == tokenizers["lower"].encode("return self") and b"".join(parts) == b"RETURN Self"


def test_a_literal_blank_sign_is_no_blank(tokenizers):
    _, parts = tokenizers["sentencepiece"].encode_with_bytes("a▁b")
    assert b"".join(parts) == "a▁b".encode() and "▁".encode() in b"".join(parts)
