"""Fast tokenizer libraries, used only where they prove to give the reference library's ids.

The proof is made at the start of every run, on documents of this very corpus and on texts that are known to be
hard; one difference, and the reference runs.
"""

import json
import os
from collections.abc import Iterator

import numpy as np

from data_prep.extract import Extract
from data_prep.inputs import WorkUnit
from data_prep.limits import DEFAULT_LIMITS, Limits
from data_prep.long_text import BrokenText
from data_prep.prefetch_tokenizer import ONE_THREAD
from data_prep.readers import read_records
from megatron_taipan.tokenizer.base import Encoded, Tokenizer
from megatron_taipan.tokenizer.hard_texts import HARD_TEXTS
from megatron_taipan.tokenizer.hf_tokenizer import HFTokenizer
from megatron_taipan.tokenizer.sentencepiece_json import tokenizer_json
from megatron_taipan.tokenizer.sentencepiece_model import BPE, USER_DEFINED, SentencePieceTokenizer, read_proto
from megatron_taipan.tokenizer.tiktoken_file import LLAMA3_PATTERN, TiktokenTokenizer

SAMPLE_UNITS, SAMPLE_CHARACTERS, SAMPLE_DOCUMENT = 16, 8_000, 4_000


class FastTokenizer(Tokenizer):
    """A reference tokenizer whose `encode` is done by fastokens."""

    def __init__(self, reference: Tokenizer, model):
        self.reference, self.model = reference, model
        model.no_truncation()  # a tokenizer.json may ask for it, beyond the length of any text of the proof
        self.library = f"fastokens {_version()}, proved equal to {reference.library}"
        self.vocab_size, self.digest = reference.vocab_size, reference.digest
        self.roles, self.end_ids = reference.roles, reference.end_ids

    def encode_batch(self, texts: list[str]) -> Encoded:
        ids, offsets = self.model.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
        return np.frombuffer(ids, np.uint32), np.diff(np.frombuffer(offsets, np.uint64)).astype(np.int64)

    def token_id(self, token: str) -> int | None:
        return self.reference.token_id(token)

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return self.reference.decode(ids, skip_special_tokens)

    def encode_with_bytes(self, text: str) -> tuple[list[int], list[bytes]]:
        return self.reference.encode_with_bytes(text)


def fast_backend_of(reference: Tokenizer, path: str, loaded=None) -> FastTokenizer:
    """The fast form of a tokenizer, for forked workers: it has encoded nothing yet and starts no threads.

    Args:
        loaded: what `PrefetchedTokenizer` read of a tokenizer.json.

    Raises:
        ValueError: there is none; the message says why.
    """
    os.environ.update(ONE_THREAD)
    try:
        import fastokens
    except ImportError as error:
        raise ValueError("the package fastokens is not installed") from error
    try:
        if isinstance(reference, SentencePieceTokenizer):
            return FastTokenizer(reference, fastokens.Tokenizer.from_json_str(_plain_bpe(path)))
        if isinstance(reference, HFTokenizer):
            return FastTokenizer(reference, loaded or fastokens.Tokenizer.from_file(path))
        if isinstance(reference, TiktokenTokenizer) and os.path.isfile(path):
            model = fastokens.Tokenizer.from_tiktoken(
                path, pattern=LLAMA3_PATTERN, special_tokens=reference.special_ids
            )
            return FastTokenizer(reference, model)
    except ValueError:
        raise
    except Exception as error:  # the library's own errors have no common type
        raise ValueError(f"fastokens does not take it: {' '.join(str(error).split())[:200]}") from error
    raise ValueError(f"{reference.library} is fast itself")


def _plain_bpe(path: str) -> str:
    """The tokenizer.json of a sentencepiece model without steps that fastokens was not seen to take as it does.

    Raises:
        ValueError: it has such a step; the message says which.
    """
    model = read_proto(path)
    norm = model.normalizer_spec
    if model.trainer_spec.model_type != BPE:
        raise ValueError("it is not a BPE model")
    if norm.precompiled_charsmap or model.trainer_spec.treat_whitespace_as_suffix:
        raise ValueError(f"its normalisation ({norm.name or 'unnamed'}) has no counterpart there")
    if norm.remove_extra_whitespaces or not norm.escape_whitespaces:
        raise ValueError("it changes white space")
    if any(piece.type == USER_DEFINED for piece in model.pieces):
        raise ValueError("it has user-defined symbols")
    return json.dumps(tokenizer_json(model))


def difference(reference: Tokenizer, fast: Tokenizer, texts: list[str]) -> str:
    """Empty if both give the same ids for every text, else where they differ or the fast one fails."""
    for text in texts:
        want = reference.encode_batch([text])[0]
        try:
            got = fast.encode_batch([text])[0]
        except Exception as error:  # the library's own errors have no common type
            return f"it fails on {text[:40]!r}: {' '.join(str(error).split())[:200]}"
        if not np.array_equal(want, got):
            at = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), min(len(want), len(got)))
            return f"it gives other ids for {text[:40]!r} (token {at} of {len(want)})"
    return ""


def sample(
    units: list[WorkUnit], extract: Extract, scratch: str | None = None, limits: Limits = DEFAULT_LIMITS
) -> Iterator[str]:
    """Documents, or their beginnings, from units spread over the corpus; then the hard texts."""
    step = max(1, len(units) // SAMPLE_UNITS)
    for unit in units[::step]:
        taken = 0
        for record in read_records(unit[0], extract, scratch, limits):
            try:
                text = record.text or (next(record.chunks, "") if record.chunks else "")
            except BrokenText:
                break
            if text:
                yield text[:SAMPLE_DOCUMENT]
                taken += min(len(text), SAMPLE_DOCUMENT)
            if taken >= SAMPLE_CHARACTERS or record.problem:
                break
    yield from HARD_TEXTS


def _version() -> str:
    from importlib.metadata import version

    return version("fastokens")
