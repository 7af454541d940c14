"""All tokens of a pair in pieces, in memory that does not grow with it."""

from collections.abc import Iterator

import numpy as np

from megatron_taipan.data.ids import refuse_outside
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.tokenizer.base import Tokenizer

BLOCK_TOKENS = 1 << 22
MOST = 1 << 24  # ids; no vocabulary has as many, and counting this many takes 128 MB


def blocks(reader: IndexedReader) -> Iterator[tuple[int, np.ndarray]]:
    """Position of each piece and its tokens, [<= BLOCK_TOKENS]."""
    for at in range(0, reader.n_tokens, BLOCK_TOKENS):
        block = np.empty(min(BLOCK_TOKENS, reader.n_tokens - at), reader.dtype)
        reader.read_into(at, block)
        yield at, block


def refuse_foreign(reader: IndexedReader, position: int, ids: np.ndarray, tokenizer: Tokenizer | None) -> None:
    """Refuses ids [n], read from token `position` on, that no tokenizer, or not this one, can have made."""
    if tokenizer is not None:
        size, whose = tokenizer.vocab_size, "this tokenizer's vocabulary"
        remedy = "the data was made with another tokenizer"
    else:
        size, whose, remedy = (
            MOST,
            "the largest vocabulary that is counted",
            "the file is damaged or not made of tokens",
        )
    refuse_outside(reader, position, ids, size, whose, remedy)
