"""A sentencepiece BPE model written as a tokenizer.json, for libraries that read only that.

Sentencepiece merges the adjacent pair whose joined piece has the highest score; a tokenizer.json lists the same merges
by rank. What has no counterpart there is refused with the reason; equality is proved on text before the result is used.
"""

import json
from pathlib import Path
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # piece types of sentencepiece_model.proto
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
SPACE = "\u2581"


def read_model(path: str | Path) -> Any:
    """The parsed file (`ModelProto` of google/sentencepiece's sentencepiece_model.proto).

    Raises:
        ValueError: it is none.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(Path(path).read_bytes())
    except Exception as error:  # protobuf's own class, in a module that moves between releases
        raise ValueError(f"it is no sentencepiece model: {error}") from error
    return model


def vocabulary_and_merges(pieces) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Of a BPE model: ids by piece (their positions), and the pairs that may be joined, the first before the others."""
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


def tokenizer_json(path: str) -> str:
    """The tokenizer.json of a sentencepiece .model.

    Raises:
        ValueError: the model has something that the form cannot express; the message says what.
    """
    model = read_model(path)
    norm = model.normalizer_spec
    if model.trainer_spec.model_type != BPE:
        raise ValueError("it is no BPE model")
    if norm.precompiled_charsmap or model.trainer_spec.treat_whitespace_as_suffix:
        raise ValueError(f"its normalisation ({norm.name or 'unnamed'}) has no counterpart there")
    if norm.remove_extra_whitespaces or not norm.escape_whitespaces:
        raise ValueError("it changes white space")
    if any(piece.type == USER_DEFINED for piece in model.pieces):
        raise ValueError("it has user-defined symbols")
    vocab, merges = vocabulary_and_merges(model.pieces)
    steps = [{"type": "Prepend", "prepend": SPACE}] if norm.add_dummy_prefix else []
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})  # type: ignore[dict-item]
    unknown = next(piece.piece for piece in model.pieces if piece.type == UNKNOWN)
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": {"type": "Sequence", "normalizers": steps},
            "pre_tokenizer": None,
            "post_processor": None,
            "decoder": None,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": unknown,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": True,
                "byte_fallback": bool(model.trainer_spec.byte_fallback),
                "ignore_merges": False,
                "vocab": vocab,
                "merges": merges,
            },
        }
    )
