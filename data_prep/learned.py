"""The ids of texts of which parts are learned, and which of the ids those are.

A user gives the model the prompt alone, so training must show it the ids of the prompt alone: with T(x) for
the ids of x, a document of prompt p and answer a has to begin with T(p). The ids of the whole text, T(pa), do so
wherever one of its tokens ends where p does; those are taken then. Otherwise (the prompt ends with the blank that the
answer's first token would begin with, or within a word) the ids are T(p), then those of a as they are after other
text. With more parts the same holds at every border.
"""

import numpy as np

from megatron_taipan.tokenizer.base import Tokenizer

BEFORE = ("\n", "0")  # text that a tokenizer keeps apart from what follows: one of them from almost anything
NONE = np.empty(0, np.uint32)


def encode_marked(
    tokenizer: Tokenizer, texts: list[str], borders: list[tuple[int, ...]]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Tokenizes d documents.

    Args:
        borders: of each text, as in `extract.Marked`.

    Returns:
        ids uint32 [n]; counts int64 [d]; mask uint8 [n], 1 where an id is learned; and in how many documents a border
        lay within a token of the whole text.
    """
    asked = [text[:end] for text, cuts in zip(texts, borders, strict=True) for end in (*cuts, len(text)) if end]
    flat, lengths = tokenizer.encode_batch(asked)
    heads = iter(np.split(flat, np.cumsum(lengths)[:-1]))
    ids, masks, apart = [], [], 0
    for text, cuts in zip(texts, borders, strict=True):
        mine = [next(heads) if end else NONE for end in (*cuts, len(text))]
        if not all(begins(mine[-1], head) for head in mine):
            mine = _apart(tokenizer, text, cuts)
            apart += 1
        ids.append(mine[-1])
        ends = np.array([0, *map(len, mine)])
        masks.append(np.repeat(np.arange(len(mine), dtype=np.uint8) % 2, np.diff(ends)))
    counts = np.array([len(one) for one in ids], np.int64)
    return np.concatenate(ids), counts, np.concatenate(masks), apart


def _apart(tokenizer: Tokenizer, text: str, cuts: tuple[int, ...]) -> list[np.ndarray]:
    """The ids up to every border and to the end, each beginning with the one before."""
    heads = [NONE]
    base, begin, last = NONE, 0, 0  # what begins at character `begin` is tokenized together, after the ids `base`
    for cut in (*cuts, len(text)):
        head = np.concatenate([base, _behind(tokenizer, text[begin:cut], first=not begin)])
        if not begins(head, heads[-1]):
            base, begin = heads[-1], last
            head = np.concatenate([base, _behind(tokenizer, text[begin:cut], first=not begin)])
        heads.append(head)
        last = cut
    return heads[1:]


def _behind(tokenizer: Tokenizer, text: str, first: bool) -> np.ndarray:
    """The ids of a text as they are after other text, or as the `first`: some tokenizers put a blank before that."""
    if not text:
        return NONE
    for before in () if first else BEFORE:
        (ids, _), (lead, _) = tokenizer.encode_batch([before + text]), tokenizer.encode_batch([before])
        if begins(ids, lead):
            return ids[len(lead) :]
    return tokenizer.encode_batch([text])[0]


def begins(ids: np.ndarray, lead: np.ndarray) -> bool:
    """Whether `ids` begin with `lead`."""
    return np.array_equal(ids[: len(lead)], lead)
