"""The ids of a text that is too long to be tokenized at once, window by window; for BPE equal to those of the whole.

Where may a text be cut? Write T(x) for the tokens of x. BPE joins the adjacent pair of best rank, the leftmost of
equals, until none is left. Two facts hold for it:

1.  If T(xy) has a token border between x and y, nothing was ever joined across it, so both sides went their own way:
    T(xy) = T(x) T(y).
2.  Whether a border stays depends on its two neighbours alone. Let a be the last token of T(x) and b the first of
    T(y). Were something joined across the border while x y is tokenized, the same would happen in the string of a b:
    until then its two halves go through the same steps, in the same order, as they do within x and y. So if a and b
    are side by side in the tokens of any text, T(xy) = T(x) T(y).

A window therefore starts a little before the cut (the overlap o), is tokenized with it, and its ids count from the cut
on if T(o y) begins with T(o) (a border at the cut, with b after it) and T(x) ends as T(o) does (in a). Whatever a
tokenizer puts in front of a text, or strips there, falls into the overlap and is thrown away. Tokenizers that first
split text by a pattern, and those that are not BPE, have no such proof: there the same comparison, over several tokens
and at a place between two words, is a check; a unigram model has passed it with a few ids that the whole text has not.
Where no place near the end passes, the window is made larger.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np

from megatron_taipan.tokenizer.base import Tokenizer

WINDOW = 1 << 19  # characters tokenized at a time
OVERLAP = 512  # characters of a window before the cut, and looked at after it
AGREE = 3  # tokens before a cut that must be the same in both windows; one would do for BPE
BETWEEN_WORDS = re.compile(r"(?<=\w)[ \n](?=\w)")
SEARCHED = 8192  # characters before the end of a window in which places between words are looked for
PLACES = 24  # of either kind tried in a window before it is made larger


def encode_stream(tokenizer: Tokenizer, chunks: Iterable[str], window: int | None = None) -> Iterator[np.ndarray]:
    """The ids of the text that the chunks make together, uint32 [n] at a time."""
    window = window or WINDOW
    source = _Source(chunks)
    text, overlap, lead = source.take(window), 0, _NONE  # `text` starts `overlap` characters before the last cut
    before: tuple[str, int, np.ndarray, np.ndarray] | None = None  # the window before: text, overlap, lead, ids
    while True:
        cut = None if source.ended else _cut(tokenizer, text, overlap, lead)
        if cut is None and not source.ended:
            text += source.take(len(text))
            continue
        ids = _ids(tokenizer, text) if cut is None else cut.ids
        if not _begins(ids, lead):  # the last cut was none after all: take both windows as one
            assert before is not None
            text, overlap, lead = before[0] + text[overlap:], before[1], before[2]
            before = None
            text += source.take(window)
            continue
        if before is not None:
            yield before[3][len(before[2]) :]
        if cut is None:
            yield ids[len(lead) :]
            return
        before = (text[: cut.at], overlap, lead, ids)
        text, overlap, lead = text[cut.at - cut.overlap :], cut.overlap, cut.lead
        text += source.take(window)


_NONE = np.empty(0, np.uint32)


class _Source:
    """Characters from an iterator of strings; `ended` as soon as nothing is left."""

    def __init__(self, chunks: Iterable[str]):
        self.chunks = iter(chunks)
        self.held = ""
        self.ended = False

    def take(self, count: int) -> str:
        """At least `count` characters, fewer at the end only."""
        parts, size = [self.held], len(self.held)
        self.held = ""
        while size < count + 1 and (chunk := next(self.chunks, None)) is not None:
            parts.append(chunk)
            size += len(chunk)
        text = "".join(parts)
        self.ended = len(text) <= count
        self.held = text[count:]
        return text[:count]


class _Cut:
    """A place where a window may end: `at`, with the overlap before it, its tokens, and those of the window so far."""

    def __init__(self, at: int, overlap: int, lead: np.ndarray, ids: np.ndarray):
        self.at, self.overlap, self.lead, self.ids = at, overlap, lead, ids


def _cut(tokenizer: Tokenizer, text: str, overlap: int, lead: np.ndarray) -> _Cut | None:
    """A place near the end of `text` at which both sides agree; None where none was found."""
    end, first = len(text) - OVERLAP, overlap + OVERLAP
    if end <= first:
        return None
    tried = 0
    words = [match.start() for match in BETWEEN_WORDS.finditer(text, max(first, end - SEARCHED), end)]
    for at in islice(reversed(words), PLACES):
        found = _overlap(tokenizer, text, at, OVERLAP)
        if found is not None:
            ids = _ids(tokenizer, text[:at])
            if _begins(ids, lead) and _ends_alike(ids, found):
                return _Cut(at, OVERLAP, found, ids)
            tried += 1
            if tried == 2:
                break
    # no words, or odd ones: the borders of tokens themselves; in a run of one character only some lengths agree
    ids = _ids(tokenizer, text[:end])
    for at, count in islice(_borders(tokenizer, text[:end], ids), PLACES):
        for length in range(OVERLAP // 2, OVERLAP // 2 + PLACES):
            if at <= first:
                break
            found = _overlap(tokenizer, text, at, length)
            if found is not None and _ends_alike(ids[:count], found):
                whole = _ids(tokenizer, text[:at])
                if np.array_equal(whole, ids[:count]):
                    return _Cut(at, length, found, whole)
    return None


def _overlap(tokenizer: Tokenizer, text: str, at: int, length: int) -> np.ndarray | None:
    """The tokens of the `length` characters before `at` if what follows leaves them as they are, else None."""
    lead, both = _ids(tokenizer, text[at - length : at]), _ids(tokenizer, text[at - length : at + OVERLAP])
    return lead if len(both) > len(lead) > AGREE and _begins(both, lead) else None


def _borders(tokenizer: Tokenizer, text: str, ids: np.ndarray) -> Iterator[tuple[int, int]]:
    """(character, token) of borders between tokens near the end, the last ones (which the end may change) left out."""
    tail = ids[-4 * PLACES :].tolist()
    for count in range(len(tail) - AGREE - 1, AGREE, -1):
        decoded = tokenizer.decode(tail[count:])
        for spelled in (decoded, " " + decoded):  # some decoders drop a leading blank
            if text.endswith(spelled):
                yield len(text) - len(spelled), len(ids) - len(tail) + count


def _ids(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return tokenizer.encode_batch([text])[0]


def _begins(ids: np.ndarray, lead: np.ndarray) -> bool:
    return np.array_equal(ids[: len(lead)], lead)


def _ends_alike(a: np.ndarray, b: np.ndarray) -> bool:
    return len(a) >= AGREE and np.array_equal(a[-AGREE:], b[-AGREE:])
