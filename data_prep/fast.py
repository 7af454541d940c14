"""Fast tokenizer libraries, used only where they prove to give the reference library's ids.

The proof is made anew at the start of every run, on documents of this very corpus and on texts that are known to be
hard; one difference, and the reference runs.
"""

import os
from collections.abc import Iterator

import numpy as np

from data_prep.extract import Extract
from data_prep.inputs import Piece
from data_prep.limits import USUAL, Limits
from data_prep.long_text import BrokenText
from data_prep.prefetch_tokenizer import ONE_THREAD
from data_prep.readers import read
from data_prep.sentencepiece_json import tokenizer_json
from data_prep.tokenizers import Encoded, HuggingFace, SentencePiece, TikToken, Tokenizer

SAMPLE_PIECES, SAMPLE_CHARACTERS, SAMPLE_DOCUMENT = 16, 8_000, 4_000
HARD = (
    " leading and trailing ",
    "   \t\t  \n\n\n   white\u00a0space\u3000of \r\n every\x0bkind\u2028 ",
    "a" * 300 + " " * 300 + "\n" * 70,
    "don't DON'T I'LL we've \u2019s 1234567890 3.14159 1,000,000 \u00bd \u2167 \u0663",
    "\u4e2d\u6587\u6ca1\u6709\u7a7a\u683c\u3002 \u65e5\u672c\u8a9e\u306e \ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22",
    "e\u0301 \u00e9 \ufb01 \u0130i\u0307 \u212b \u1e9e\u00df na\u0131ve",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f \U0001f600\U0001f600",
    "\u0000\u0001\u007f\u0085\ufeff\ufffd\u200b\u202e \U0010ffff \ue000",
    "<s> </s> <unk> <pad> <|endoftext|> <|begin_of_text|> <|im_start|> [INST] <0x0A> \u2581 \u0120the",
    "def f(x):\n\treturn {'a': [x**2 for _ in range(10)]}  # comment\n\n\n    if x != 3: pass\n",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u05e2\u05d1\u05e8\u05d9\u05ea \u0939\u093f\u0928\u094d \u0bb5\u0bbe",
    'https://example.org/a?b=c&d=%20#e <a href="x">y</a> \\frac{1}{2} $$\\sum_{i=0}^n$$ ...!!!???---===',
)


class Fast(Tokenizer):
    """A reference tokenizer whose `encode` is done by fastokens."""

    def __init__(self, reference: Tokenizer, model):
        self.reference, self.model = reference, model
        model.no_truncation()  # a tokenizer.json may ask for it, beyond the length of any text of the proof
        self.library = f"fastokens {_version()}, proved equal to {reference.library}"
        self.vocab_size, self.eod, self.bos = reference.vocab_size, reference.eod, reference.bos
        self.digest, self.roles = reference.digest, reference.roles

    def encode(self, texts: list[str]) -> Encoded:
        ids, offsets = self.model.encode_batch_flat(texts, add_special_tokens=False, split_special_tokens=True)
        return np.frombuffer(ids, np.uint32), np.diff(np.frombuffer(offsets, np.uint64)).astype(np.int64)

    def token_id(self, token: str) -> int | None:
        return self.reference.token_id(token)

    def decode(self, ids: list[int]) -> str:
        return self.reference.decode(ids)


def fast_backend_of(reference: Tokenizer, path: str, loaded=None) -> Fast:
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
        if isinstance(reference, SentencePiece):
            return Fast(reference, fastokens.Tokenizer.from_json_str(tokenizer_json(path)))
        if isinstance(reference, HuggingFace):
            return Fast(reference, loaded or fastokens.Tokenizer.from_file(path))
        if isinstance(reference, TikToken) and os.path.isfile(path):
            special = dict(reference.model._special_tokens)
            model = fastokens.Tokenizer.from_tiktoken(path, pattern=reference.LLAMA3, special_tokens=special)
            return Fast(reference, model)
    except ValueError:
        raise
    except Exception as error:  # the library's own errors have no common type
        raise ValueError(f"fastokens does not take it: {' '.join(str(error).split())[:200]}") from error
    raise ValueError(f"{reference.library} is fast itself")


def difference(reference: Tokenizer, fast: Tokenizer, texts: list[str]) -> str:
    """Empty if both give the same ids for every text, else where they differ."""
    for text in texts:
        want = reference.encode([text])[0]
        got = fast.encode([text])[0]
        if not np.array_equal(want, got):
            at = next((i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b), min(len(want), len(got)))
            return f"it gives other ids for {text[:40]!r} (token {at} of {len(want)})"
    return ""


def sample(pieces: list[Piece], extract: Extract, scratch: str | None = None, limits: Limits = USUAL) -> Iterator[str]:
    """Documents, or their beginnings, from pieces spread over the corpus; then the hard texts."""
    step = max(1, len(pieces) // SAMPLE_PIECES)
    for piece in pieces[::step]:
        taken = 0
        for record in read(piece[0], extract, scratch, limits):
            try:
                text = record.text or (next(record.chunks, "") if record.chunks else "")
            except BrokenText:
                break
            if text:
                yield text[:SAMPLE_DOCUMENT]
                taken += min(len(text), SAMPLE_DOCUMENT)
            if taken >= SAMPLE_CHARACTERS or record.problem:
                break
    yield from HARD


def _version() -> str:
    from importlib.metadata import version

    return version("fastokens")
