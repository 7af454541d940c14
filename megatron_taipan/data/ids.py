"""Ids outside the vocabulary: the error says which id it is and where in the file."""

import numpy as np

from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.errors import UserError

UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}


def all_below(ids: np.ndarray, vocab_size: int) -> bool:
    """Whether stored ids of any shape, contiguous, are 0 to vocab_size - 1."""
    if not ids.size:
        return True
    unsigned = ids.view(UNSIGNED[ids.itemsize])  # a negative id is a large one too
    return bool(np.maximum.reduce(unsigned, axis=None) < vocab_size)


def first_outside(ids: np.ndarray, vocab_size: int) -> int:
    """Number of the first of ids [n] that is negative or not below vocab_size; there must be one."""
    return int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])


def outside(reader: IndexedReader, position: int, vocab_size: int, whose: str, remedy: str) -> UserError:
    """The error of the id at token `position` of a file.

    Args:
        whose: whose vocabulary it is, as in "the model's vocabulary".
        remedy: what to do about one that is too large.
    """
    out = np.empty(1, reader.dtype)
    reader.read_into(position, out)
    prefix, token, document = reader.where(position)
    found = f"{prefix}.bin holds id {out[0]} at token {token} (in document {document})"
    if out[0] < 0:
        return UserError(f"{found}; ids are never negative: the file is damaged or not made of tokens, make it again")
    return UserError(f"{found} and {whose} has {vocab_size} ids (0 to {vocab_size - 1}); {remedy}")


def refuse_outside(
    reader: IndexedReader, position: int, ids: np.ndarray, vocab_size: int, whose: str, remedy: str
) -> None:
    """Refuses ids [n], read from token `position` of a file on, beyond a vocabulary; `outside` for the arguments."""
    if not all_below(ids, vocab_size):
        raise outside(reader, position + first_outside(ids, vocab_size), vocab_size, whose, remedy)


def beyond_model(reader: IndexedReader, position: int, vocab_size: int) -> UserError:
    """The error of an id that the model does not have."""
    return outside(
        reader, position, vocab_size, "the model's vocabulary",
        "set model.vocab_size to the tokenizer's size, or tokenize with the model's tokenizer",
    )  # fmt: skip
