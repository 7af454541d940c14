"""A stream of tokens: some ranges of an indexed file put end to end, as a ring."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from megatron_taipan.data.indexed import CHUNK, IndexedReader


class TokenSpan:
    """A run of tokens of a stream: where they are in the file, and where other documents begin in it.

    `doc_starts` are token numbers within the span, above 0 and rising. `runs`: see `TokenSpans`; None where the tokens
    are in one place.
    """

    __slots__ = ("reader", "position", "runs", "doc_starts")

    def __init__(
        self, reader: IndexedReader, position: int, runs: list[tuple[int, int, int]] | None, doc_starts: list[int]
    ):
        self.reader, self.position, self.runs, self.doc_starts = reader, position, runs, doc_starts

    def read_into(self, out: memoryview) -> None:
        """Fills the bytes `out` with the tokens, as the file holds them."""
        if self.runs is None:
            self.reader.read_bytes(self.position, out)
        else:
            size = self.reader.dtype.itemsize
            for position, begin, end in self.runs:
                self.reader.read_bytes(position, out[begin * size : end * size])

    def tokens_before(self) -> int:
        """How many tokens of its document are in front of the span's first token; found in the index."""
        return self.position - self.reader.start(self.reader.find(self.position))

    def token(self, number: int) -> int:
        """Where in the file token `number` of the span is."""
        for position, begin, end in self.runs or []:
            if begin <= number < end:
                return position + number - begin
        return self.position + number


@dataclass(slots=True)
class TokenSpans:
    """Many spans of a stream, in few objects: hundreds of small ones would keep the garbage collector busy.

    Attributes:
        position: for each span, where in the file its first token is.
        runs: for spans that are in several places of the file, each run as (position in the file, begin, end in the
            span).
        doc_starts: where other documents begin, span after span; those of span k are [bounds[k], bounds[k + 1]).
    """

    reader: IndexedReader
    position: list[int]
    runs: dict[int, list[tuple[int, int, int]]]
    doc_starts: list[int]
    bounds: list[int]

    def spans(self, numbers: Iterable[int]) -> list[TokenSpan]:
        """The spans of these numbers."""
        position, runs, starts, bounds = self.position, self.runs, self.doc_starts, self.bounds
        return [TokenSpan(self.reader, position[k], runs.get(k), starts[bounds[k] : bounds[k + 1]]) for k in numbers]


class TokenStream:
    """Whole documents of one file, in file order, as one ring of tokens.

    Args:
        reader: the file.
        start, stop: int64 [p], token positions in the file; range k is [start[k], stop[k]), made of whole documents.
    """

    def __init__(self, reader: IndexedReader, start: np.ndarray, stop: np.ndarray):
        kept = stop > start
        self.reader = reader
        self.start = np.ascontiguousarray(start[kept], np.int64)
        self.position = np.concatenate([[0], np.cumsum(stop[kept] - start[kept])])  # [p + 1], in stream coordinates
        self.n_tokens = int(self.position[-1])

    def locate(self, positions: np.ndarray, length: int) -> "TokenSpans":
        """Finds spans of the ring, `length` <= n_tokens tokens from each of `positions` (int64 [m]) on."""
        # ranges are counted on past the end of the ring, range p being range 0 again
        first, last = self._range(positions), self._range(positions + (length - 1))
        per = last - first + 1  # [m], runs of each span
        owner = np.repeat(np.arange(len(positions)), per)  # [r], span of each run
        run_start = np.cumsum(per) - per  # [m]
        number = first[owner] + np.arange(len(owner)) - run_start[owner]
        turn, number = np.divmod(number, len(self.start))
        shift = turn * self.n_tokens - positions[owner]  # from ring to span
        begin = np.maximum(self.position[number] + shift, 0)
        end = np.minimum(self.position[number + 1] + shift, length)
        at = self.start[number] + begin - (self.position[number] + shift)
        # a run that is not the first of its span begins with a document
        found, run = self.reader.boundaries(at + (begin == 0), at + end - begin)
        many = np.flatnonzero(per > 1)
        runs = {
            span: list(zip(at[a:b].tolist(), begin[a:b].tolist(), end[a:b].tolist(), strict=True))
            for span, a, b in zip(many.tolist(), run_start[many], (run_start + per)[many], strict=True)
        }
        bounds = np.searchsorted(owner[run], np.arange(len(positions) + 1))
        return TokenSpans(
            self.reader, at[run_start].tolist(), runs, (found - (at - begin)[run]).tolist(), bounds.tolist()
        )

    def _range(self, positions: np.ndarray) -> np.ndarray:
        """The ranges that hold ring positions in [0, 2 * n_tokens): int64 [m] -> int64 [m], below 2 * p."""
        again = positions >= self.n_tokens
        if len(self.start) == 1:
            return again.astype(np.int64)
        found = self.position.searchsorted(np.where(again, positions - self.n_tokens, positions), "right") - 1
        return np.where(again, found + len(self.start), found)

    def read_into(self, position: int, out: np.ndarray) -> list[int]:
        """Fills `out` with the tokens from stream `position` on, wrapping at the end; returns the span's doc_starts."""
        [span] = self.locate(np.array([position]), len(out)).spans([0])
        span.read_into(out.data.cast("B"))
        return span.doc_starts

    def long_documents(self, least: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Documents of at least `least` tokens: stream positions [d], lengths [d]; and the longest of all."""
        found, longest = [], 0
        if not self.n_tokens:  # ranges without tokens were dropped, so there are none here
            return np.empty(0, np.int64), np.empty(0, np.int64), 0
        for at in range(0, self.reader.n_documents, CHUNK):
            start = self.reader.starts(np.arange(at, min(at + CHUNK, self.reader.n_documents) + 1))
            start, length = start[:-1], np.diff(start)
            range_ = self.start.searchsorted(start, "right") - 1
            offset = start - self.start[range_]
            inside = (range_ >= 0) & (offset < np.diff(self.position)[range_])
            longest = max(longest, int(length[inside].max(initial=0)))
            kept = inside & (length >= least)
            found.append((self.position[range_[kept]] + offset[kept], length[kept]))
        return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found]), longest


def whole(reader: IndexedReader) -> TokenStream:
    """All documents of a file."""
    return TokenStream(reader, np.array([0]), np.array([reader.n_tokens]))
