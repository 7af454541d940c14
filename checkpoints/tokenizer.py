"""The tokenizer of an exported model: one `tokenizer.json` that the `tokenizers` library reads without our code.

A sentencepiece model is rewritten piece by piece; what the two libraries make of real and of hostile text is then
compared, and a tokenizer that gives other ids than the one the data was made with is refused.

It behaves as code written for transformers expects: the spelling of a special token in a text becomes its id, where
`data_prep` keeps it text (`split_special_tokens=True` does so here); and it puts before a text what came before each
document of the training data, or nothing.
"""

import json
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Exported
from tokenizers.processors import TemplateProcessing

from checkpoints.document_ends import DocumentEnds, document_ends
from checkpoints.tiktoken_conversion import convert_tiktoken
from megatron_taipan.data.made_with import added_ids
from megatron_taipan.data_config import DataConfig
from megatron_taipan.errors import UserError
from megatron_taipan.tokenizer.base import Tokenizer
from megatron_taipan.tokenizer.hard_texts import hostile_texts
from megatron_taipan.tokenizer.hf_tokenizer import HFTokenizer
from megatron_taipan.tokenizer.load import load_tokenizer_file
from megatron_taipan.tokenizer.sentencepiece_json import tokenizer_json
from megatron_taipan.tokenizer.sentencepiece_model import CONTROL, UNKNOWN, USER_DEFINED, read_proto
from megatron_taipan.tokenizer.special_tokens import END_TOKENS
from megatron_taipan.tokenizer.tiktoken_file import TiktokenTokenizer
from megatron_taipan.tokenizer.token_bytes import SPACE

SPLIT = "split_special_tokens"  # of transformers: the spelling of a special token in a text stays text


@dataclass(frozen=True)
class Special:
    """The special tokens of an exported tokenizer, by kind (`bos_token`, ...)."""

    tokens: dict[str, str] = field(default_factory=dict)  # spellings
    ids: dict[str, int] = field(default_factory=dict)
    ends: DocumentEnds | None = None  # what surrounded the documents of the training data; None: unknown

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
    with, or else the tokenizer's own, for those who train the model further.

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
    reference = load_tokenizer_file(source)
    recorded = (
        {END_TOKENS[role] for role in added_ids(each.prefix for each in data.train)} if data is not None else set()
    )
    tokenizer, tokens = convert(source, reference), special_tokens(source, reference, known=recorded)
    if not isinstance(reference, HFTokenizer):
        assert_same_ids(source, reference, tokenizer, [*user_defined_texts(tokenizer), *texts])
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
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    ids = {kind: tokenizer.token_to_id(token) for kind, token in tokens.items()}
    return Special(tokens, {kind: number for kind, number in ids.items() if number is not None}, ends)


def refuse_larger(source: Path, tokenizer: Exported, vocab_size: int | None) -> None:
    """Raises UserError if a tokenizer has more tokens than a model (None: any number)."""
    if vocab_size is not None and tokenizer.get_vocab_size() > vocab_size:
        raise UserError(
            f"{source} has {tokenizer.get_vocab_size()} tokens, the model only {vocab_size}; pass the tokenizer that"
            " the data was made with"
        )


def spelling(source: Path, tokenizer: Exported, index: int) -> str:
    """The spelling of a token that surrounds the documents of the training data.

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


def begin_with(tokenizer: Exported, bos: str | None) -> None:
    """Makes it put `bos`, or nothing, before a text, and nothing after it, whatever its file says."""
    if bos is None and not tokenizer.num_special_tokens_to_add(False):
        return
    head = "" if bos is None else f"{bos}:0 "
    known = [] if bos is None else [(bos, tokenizer.token_to_id(bos))]
    pair = f"{head}$A:0 {head.replace(':0', ':1')}$B:1"
    tokenizer.post_processor = TemplateProcessing(single=f"{head}$A:0", pair=pair, special_tokens=known)


def user_defined_texts(tokenizer: Exported) -> list[str]:
    """Texts with the user-defined pieces of a converted sentencepiece model, around which the libraries may differ."""
    pieces = [token.content for token in tokenizer.get_added_tokens_decoder().values() if not token.special]
    return [text for piece in pieces for text in (piece, f"a{piece}b", f"a {piece} b")]


def special_tokens(source: Path, tokenizer: Tokenizer, known: Container[str] = ()) -> dict[str, str]:
    """The special tokens of a tokenizer by kind (`bos_token`, ...), but for the kinds that are known already.

    Raises:
        UserError: nothing says which of several begins or ends a text.
    """
    special = {}
    for kind, role in tokenizer.roles.items():
        if len(role.candidates) > 1 and kind in END_TOKENS.values() and kind not in known:
            raise UserError(f"{source}: {kind}: {role.said}; put the model's tokenizer_config.json beside it")
        if role.id is not None:
            special[kind] = role.candidates[role.id]
    return special


def convert(source: Path, tokenizer: Tokenizer) -> Exported:
    """A tokenizer as the tokenizers library runs it, with the same ids.

    Raises:
        UserError: it cannot be expressed there.
    """
    if isinstance(tokenizer, HFTokenizer):
        return tokenizer.model
    if isinstance(tokenizer, TiktokenTokenizer):
        return convert_tiktoken(source)
    return convert_sentencepiece(source)


def convert_sentencepiece(path: Path) -> Exported:
    """A sentencepiece model as the tokenizers library runs it; its control pieces are special tokens there.

    Raises:
        UserError: the model has something that tokenizer.json cannot express.
    """
    try:
        proto = read_proto(path)
        content = tokenizer_json(proto)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    tokenizer = Exported.from_str(json.dumps(content))
    if content["model"].pop("type") == "Unigram":  # again, with exact scores: the library's parser is off by one digit
        scores = [(piece, score) for piece, score in content["model"].pop("vocab")]
        tokenizer.model = models.Unigram(scores, **content["model"])
    # The space that sentencepiece puts before a text stays when ids are decoded: a decoder that strips it takes it from
    # a continuation too, and transformers' pipelines decode the continuation alone and join it to the prompt.
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [p.piece for p in proto.pieces if p.type in (CONTROL, UNKNOWN)]
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    own = [p.piece for p in proto.pieces if p.type == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in own])
    tokenizer.encode_special_tokens = True
    return tokenizer


def assert_same_ids(source: Path, reference: Tokenizer, tokenizer: Exported, texts: Iterable[str]) -> int:
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
