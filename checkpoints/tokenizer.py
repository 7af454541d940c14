"""The tokenizer of an exported model: one `tokenizer.json` that the `tokenizers` library reads without our code.

A sentencepiece model is rewritten piece by piece; what the two libraries make of real and of hostile text is then
compared, and a tokenizer that gives other ids than the one the data was made with is refused.

It behaves as code written for transformers expects: the spelling of a special token in a text becomes its id, where
`data_prep` keeps it text (`split_special_tokens=True` does so here); and it puts before a text what stood before each
document of the training data, or nothing.
"""

import base64
import json
import random
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing

from checkpoints.document_ends import DocumentEnds, document_ends
from checkpoints.tiktoken_file import convert_tiktoken
from data_prep.sentencepiece_json import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNIGRAM,
    UNKNOWN,
    USER_DEFINED,
    read_model,
    vocabulary_and_merges,
)
from megatron_taipan.config import DataConfig
from megatron_taipan.data.made_with import added_ids
from megatron_taipan.data.special_tokens import USUAL, find_role
from megatron_taipan.errors import UserError
from megatron_taipan.inference.text import TextCodec, TikTokenCodec, TokenizersCodec, load_codec

SPLIT = "split_special_tokens"  # of transformers: the spelling of a special token in a text stays text
ROLES = {"bos": "bos_token", "eod": "eos_token"}  # of a manifest, by their names in transformers
NEVER = -1e9  # a score that keeps control pieces out of every segmentation of text


@dataclass(frozen=True)
class Special:
    """The special tokens of an exported tokenizer, by kind (`bos_token`, ...)."""

    tokens: dict[str, str] = field(default_factory=dict)  # spellings
    ids: dict[str, int] = field(default_factory=dict)
    ends: DocumentEnds | None = None  # what stood around the documents of the training data; None: unknown

    @property
    def settings(self) -> dict[str, int]:
        """What config.json and generation_config.json say of them."""
        return {f"{kind}_id": self.ids[kind] for kind in ("bos_token", "eos_token", "pad_token") if kind in self.ids}


def write_tokenizer(
    source: Path,
    folder: Path,
    texts: Iterable[str],
    model_max_length: int | None,
    vocab_size: int | None = None,
    data: DataConfig | None = None,
) -> Special:
    """Writes tokenizer.json and tokenizer_config.json for `source` into `folder`.

    A BOS is declared only where the documents of the training data began with one. The EOS is the token that they ended
    with, or else the tokenizer's own, for whoever trains the model further.

    Args:
        source: a sentencepiece model, a tiktoken file, or a `tokenizer.json` of the tokenizers library.
        texts: text on which the ids must agree, besides `hostile_texts()`.
        model_max_length: tokens per sample in training, noted in the tokenizer's configuration where known.
        vocab_size: ids that the model has; may exceed the tokenizer's, never the other way round.
        data: the training data, which need not be there any more.

    Raises:
        UserError: the file is of no known kind, has more tokens than the model, lacks one that the data has, the
            conversion gives other ids, or nothing says which of several tokens ends a document.
    """
    codec = load_codec(source)
    told = {ROLES[role] for role in added_ids(each.prefix for each in data.train)} if data is not None else set()
    if isinstance(codec, TokenizersCodec):
        tokenizer, tokens = codec.tokenizer, special_tokens(source, codec.tokenizer, known=told)
    else:
        convert = convert_tiktoken if isinstance(codec, TikTokenCodec) else convert_sentencepiece
        tokenizer, tokens = convert(source)
        assert_same_ids(source, codec, tokenizer, [*user_defined_texts(tokenizer), *texts])
    refuse_larger(source, tokenizer, vocab_size)
    bos, eos = (tokenizer.token_to_id(tokens[kind]) if kind in tokens else None for kind in ("bos_token", "eos_token"))
    ends = document_ends(data, bos, eos) if data is not None else None
    tokens.pop("bos_token", None)
    around = (("bos_token", ends.begin), ("eos_token", ends.end)) if ends is not None else ()
    for kind, index in around:
        if index is not None:
            tokens[kind] = spelling(source, tokenizer, index)
    if "pad_token" not in tokens and tokens:
        tokens["pad_token"] = tokens.get("eos_token", next(iter(tokens.values())))
    begin_with(tokenizer, tokens.get("bos_token"))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **({} if model_max_length is None else {"model_max_length": model_max_length}),
        "padding_side": "left",  # a causal model continues the end of each row
        "clean_up_tokenization_spaces": False,
        "add_bos_token": "bos_token" in tokens,
        "add_eos_token": False,  # a prompt is to be continued
        **tokens,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    ids = {kind: tokenizer.token_to_id(token) for kind, token in tokens.items()}
    return Special(tokens, {kind: number for kind, number in ids.items() if number is not None}, ends)


def refuse_larger(source: Path, tokenizer: Tokenizer, vocab_size: int | None) -> None:
    """Raises UserError if a tokenizer has more tokens than a model (None: any number)."""
    if vocab_size is not None and tokenizer.get_vocab_size() > vocab_size:
        raise UserError(
            f"{source} has {tokenizer.get_vocab_size()} tokens, the model only {vocab_size}; pass the tokenizer that"
            " the data was made with"
        )


def spelling(source: Path, tokenizer: Tokenizer, index: int) -> str:
    """The spelling of a token that stands around the documents of the training data.

    Raises:
        UserError: the tokenizer has no such id.
    """
    found = tokenizer.id_to_token(index)
    if found is None:
        raise UserError(
            f"the documents of the training data have id {index} at their ends, which {source} with its"
            f" {tokenizer.get_vocab_size()} tokens does not have; pass the tokenizer that the data was made with"
        )
    return found


def begin_with(tokenizer: Tokenizer, bos: str | None) -> None:
    """Makes it put `bos`, or nothing, before a text, and nothing behind, whatever its file says."""
    if bos is None and not tokenizer.num_special_tokens_to_add(False):
        return
    head = "" if bos is None else f"{bos}:0 "
    known = [] if bos is None else [(bos, tokenizer.token_to_id(bos))]
    pair = f"{head}$A:0 {head.replace(':0', ':1')}$B:1"
    tokenizer.post_processor = TemplateProcessing(single=f"{head}$A:0", pair=pair, special_tokens=known)


def user_defined_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts with the user-defined pieces of a converted sentencepiece model, around which the libraries may differ."""
    pieces = [token.content for token in tokenizer.get_added_tokens_decoder().values() if not token.special]
    return [text for piece in pieces for text in (piece, f"a{piece}b", f"a {piece} b")]


def special_tokens(source: Path, tokenizer: Tokenizer, known: Container[str] = ()) -> dict[str, str]:
    """The special tokens of a tokenizer.json by kind, but for the kinds that are known already.

    Raises:
        UserError: nothing says which of several begins or ends a text.
    """
    marked = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    special = {}
    for kind in USUAL:
        role = find_role(kind, source, tokenizer.token_to_id, marked)
        if len(role.candidates) > 1 and kind in ROLES.values() and kind not in known:
            raise UserError(f"{source}: {kind}: {role.said}; put the model's tokenizer_config.json beside it")
        if role.id is not None:
            special[kind] = role.candidates[role.id]
    return special


def convert_sentencepiece(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """A tokenizers-library tokenizer with the pieces of a sentencepiece model, and its special tokens by kind.

    The format is google/sentencepiece's `sentencepiece_model.proto`. Ids are the positions of the pieces.
    """
    try:
        proto = read_model(path)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.treat_whitespace_as_suffix:
        raise UserError(f"{path}: treat_whitespace_as_suffix has no counterpart in tokenizer.json")
    pieces = list(proto.pieces)
    model: models.Model
    if trainer.model_type == BPE:
        model = _bpe(pieces, trainer.unk_piece)
    elif trainer.model_type == UNIGRAM:
        unknown = next(i for i, piece in enumerate(pieces) if piece.type == UNKNOWN)
        scores = [(p.piece, p.score if p.type == NORMAL else NEVER) for p in pieces]
        model = models.Unigram(scores, unk_id=unknown, byte_fallback=trainer.byte_fallback)
    else:
        raise UserError(f"{path}: only sentencepiece models of type bpe and unigram can be exported")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = _normalizer(rules)
    # The space that sentencepiece puts before a text stays when ids are decoded: a decoder that strips it takes it from
    # a continuation too, and transformers' pipelines decode the continuation alone and join it to the prompt.
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = {}
    named = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "pad_token": trainer.pad_id}
    for kind, index in {**named, "unk_token": trainer.unk_id}.items():
        if 0 <= index < len(pieces):
            special[kind] = pieces[index].piece
    added = [AddedToken(p.piece, special=True, normalized=False) for p in pieces if p.type in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens(added)
    tokenizer.add_tokens([AddedToken(p.piece, normalized=False) for p in pieces if p.type == USER_DEFINED])
    tokenizer.encode_special_tokens = True
    return tokenizer, special


def _bpe(pieces: list, unk_piece: str) -> models.BPE:
    """sentencepiece joins the pair whose joint piece has the highest score; that order becomes merge ranks."""
    vocabulary, merges = vocabulary_and_merges(pieces)
    has_bytes = any(piece.type == BYTE for piece in pieces)
    return models.BPE(vocabulary, merges, unk_token=unk_piece, fuse_unk=True, byte_fallback=has_bytes)


def _normalizer(rules) -> normalizers.Normalizer:
    """The steps of sentencepiece's normalizer, in its order."""
    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        charsmap = base64.b64encode(rules.precompiled_charsmap).decode()
        steps.append(_from_json({"type": "Precompiled", "precompiled_charsmap": charsmap}))
    if rules.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    if rules.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    if rules.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(f"{SPACE}+\\z"), ""))  # sentencepiece strips literal ones at the end too
    return normalizers.Sequence(steps)


def _from_json(step: dict) -> normalizers.Normalizer:
    """A normalizer from its serialized form (the constructor of Precompiled differs between releases)."""
    shell: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": step,
    }
    shell |= {"pre_tokenizer": None, "post_processor": None, "decoder": None}
    shell["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}
    return Tokenizer.from_str(json.dumps(shell)).normalizer


def assert_same_ids(source: Path, reference: TextCodec, tokenizer: Tokenizer, texts: Iterable[str]) -> int:
    """Compares the ids of both libraries; returns the number of texts compared.

    Raises:
        UserError: with the first text on which they differ.
    """
    count = 0
    for text in [*hostile_texts(), *texts]:
        wanted = reference.encode(text)
        got = tokenizer.encode(text, add_special_tokens=False).ids
        if wanted != got:
            differ = (i for i, (a, b) in enumerate(zip(wanted, got, strict=False)) if a != b)
            at = next(differ, min(len(wanted), len(got)))
            raise UserError(
                f"{source}: the converted tokenizer gives other ids for {text[:80]!r} (from token {at}:"
                f" {got[at : at + 5]} instead of {wanted[at : at + 5]}), so it cannot be exported exactly"
                " (sentencepiece: type bpe with normalization identity can); pass --no-tokenizer to export without one"
            )
        count += 1
    return count


def hostile_texts() -> list[str]:
    """Texts on which tokenizers like to disagree: odd Unicode, white space, text that looks like special tokens."""
    fixed = [
        "",
        " ",
        "  ",
        " " * 1000,
        "\n\n\n \t\t  \r\n",
        " leading and trailing  ",
        "a" * 500,
        "tabs\tand\nnew lines\r\n  indented\n\n\n\n        code()",
        "<s>not a token</s> <unk> <pad> <0x0A> <|endoftext|>",
        "▁ literal ▁▁ blanks▁",
        "naïve café Å Å ﬁ ﬀ ﬃ ① ½ ﷺ ㎢ Ⅷ",
        "e\u0301 a\u0308\u0323 \u0344 \u1e9b\u0323 q\u0307\u0323",
        "नमस्ते ক্ষ สวัสดี 안녕 한국어 こんにちは 漢字 ﾊﾝｶｸ",
        "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽 ☺️",
        "zero\u200bwidth\u200d joiner\ufeff bom \u00a0nbsp \u3000ideographic \u2028line \u2029para \u0085nel",
        "\u202eright to left\u202c שלום مرحبا",
        "control \x00 \x01 \x07 \x08 \x1b[0m \x7f \x9f",
        "\U0001d54f \U0010ffff \ue000 \ufffd \ufffe",
        "x" + "\u0300" * 50,
        "1234567890 3.14159 1,000,000 -5e-10 0x1F",
        "don't won't it's—“quoted” ‘text’ … – -",
        "def f(x):\n    return {'a': [1, 2, (3,)], \"b\": x**2}\n",
    ]
    draw = random.Random(0)
    ranges = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x400, 0x4FF), (0x900, 0x97F), (0x2000, 0x206F)]
    ranges += [(0x3040, 0x30FF), (0x4E00, 0x4FFF), (0xAC00, 0xAD00), (0x1F600, 0x1F64F), (0xFB00, 0xFB06)]
    noise = []
    for _ in range(200):
        spans = [draw.choice(ranges) for _ in range(draw.randint(1, 4))] + [(0x20, 0x20)]
        noise.append("".join(chr(draw.randint(*draw.choice(spans))) for _ in range(draw.randint(1, 60))))
    return fixed + noise
