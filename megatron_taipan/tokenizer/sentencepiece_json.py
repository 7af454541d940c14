"""A sentencepiece model written as a tokenizer.json, for exports and for libraries that read only that.

What has no counterpart there is refused with the reason. Whoever uses the result proves on text first that the ids are
the same: the tokenizers library applies some normalisation rules to grapheme clusters, sentencepiece does not.
"""

import base64
from typing import Any

from megatron_taipan.tokenizer.sentencepiece_model import BPE, NORMAL, UNIGRAM, UNKNOWN
from megatron_taipan.tokenizer.token_bytes import SPACE

NEVER = -1e9  # a score that keeps control pieces out of every segmentation of text


def tokenizer_json(proto: Any) -> dict[str, Any]:
    """The content of a tokenizer.json with the pieces of a model, without added tokens and decoder.

    Ids are the positions of the pieces.

    Args:
        proto: as `read_proto` gives it.

    Raises:
        ValueError: the model has something that the form cannot express; the message says what.
    """
    if proto.trainer_spec.treat_whitespace_as_suffix:
        raise ValueError("treat_whitespace_as_suffix has no counterpart in tokenizer.json")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(proto.normalizer_spec)},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": _model(proto.trainer_spec, proto.pieces),
    }


def _model(trainer: Any, pieces: Any) -> dict[str, Any]:
    """The pieces. Which is the unknown one its type says, as in sentencepiece itself; the options' `unk_piece` may be
    spelled otherwise."""
    unknown = next(i for i, piece in enumerate(pieces) if piece.type == UNKNOWN)
    if trainer.model_type == UNIGRAM:
        scores = [[piece.piece, piece.score if piece.type == NORMAL else NEVER] for piece in pieces]
        return {"type": "Unigram", "unk_id": unknown, "vocab": scores, "byte_fallback": bool(trainer.byte_fallback)}
    if trainer.model_type != BPE:
        raise ValueError("only sentencepiece models of type bpe and unigram can be written as tokenizer.json")
    vocabulary, merges = vocabulary_and_merges(pieces)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": pieces[unknown].piece,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": bool(trainer.byte_fallback),
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
    }


def vocabulary_and_merges(pieces: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Of a BPE model: ids by piece (their positions), and the pairs that may be joined, the first before the others.

    sentencepiece joins the pair whose joint piece has the highest score; that order becomes merge ranks.
    """
    vocabulary = {piece.piece: i for i, piece in enumerate(pieces)}
    scores = {piece.piece: piece.score for piece in pieces if piece.type == NORMAL}
    merges = []
    for piece, score in scores.items():
        for at in range(1, len(piece)):
            left, right = piece[:at], piece[at:]
            if left in scores and right in scores:
                # of several ways to the same piece sentencepiece takes the leftmost, so that runs of one character
                # grow from the left: the longer left part comes first
                merges.append((-score, vocabulary[piece], -len(left), (left, right)))
    return vocabulary, [merge[-1] for merge in sorted(merges)]


def _normalizers(rules: Any) -> list[dict[str, Any]]:
    """The steps of sentencepiece's normalizer, in its order."""
    steps: list[dict[str, Any]] = []
    if rules.precompiled_charsmap:
        charsmap = base64.b64encode(rules.precompiled_charsmap).decode()
        steps.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if rules.remove_extra_whitespaces:
        steps += [_replace({"Regex": r"\A +| +\z"}, ""), _replace({"Regex": " {2,}"}, " ")]
    if rules.add_dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    if rules.escape_whitespaces:
        steps.append(_replace({"String": " "}, SPACE))
    if rules.remove_extra_whitespaces:
        steps.append(_replace({"Regex": f"{SPACE}+\\z"}, ""))  # sentencepiece strips literal ones at the end too
    return steps


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}
