"""A stream of tokens: some ranges of an indexed file laid end to end, and round again."""

import numpy as np

from megatron_taipan.data.indexed import CHUNK, IndexedReader


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

    def locate(self, positions: np.ndarray, length: int) -> list[tuple[list[tuple[int, int, int]], list[int]]]:
        """Finds stretches of the ring, `length` <= n_tokens tokens from each of `positions` (int64 [m]) on.

        Returns:
            of each: its runs of neighbouring tokens in the file as (position in the file, [begin, end) in the stretch),
            and the places in it, above 0 and rising, at which another document begins.
        """
        # ranges are counted on past the end of the ring, range p being range 0 again
        first, last = self._range(positions), self._range(positions + (length - 1))
        per = last - first + 1  # [m], runs of each stretch
        owner = np.repeat(np.arange(len(positions)), per)  # [r], stretch of each run
        number = first[owner] + np.arange(len(owner)) - np.repeat(np.cumsum(per) - per, per)
        turn, number = np.divmod(number, len(self.start))
        shift = turn * self.n_tokens - positions[owner]  # from ring to stretch
        begin = np.maximum(self.position[number] + shift, 0)
        end = np.minimum(self.position[number + 1] + shift, length)
        at = self.start[number] + begin - (self.position[number] + shift)
        # a run that does not begin its stretch begins with a document
        found, run = self.reader.boundaries(at + (begin == 0), at + end - begin)
        places = found - (at - begin)[run]
        runs = list(zip(at.tolist(), begin.tolist(), end.tolist(), strict=True))
        begins = places.tolist()
        run_stop = np.cumsum(per).tolist()
        begin_stop = np.cumsum(np.bincount(owner[run], minlength=len(positions))).tolist()
        return [
            (runs[a:b], begins[c:d])
            for a, b, c, d in zip([0, *run_stop], run_stop, [0, *begin_stop], begin_stop, strict=False)
        ]

    def _range(self, positions: np.ndarray) -> np.ndarray:
        """The ranges that hold ring positions in [0, 2 * n_tokens): int64 [m] -> int64 [m], below 2 * p."""
        again = positions >= self.n_tokens
        if len(self.start) == 1:
            return again.astype(np.int64)
        found = self.position.searchsorted(np.where(again, positions - self.n_tokens, positions), "right") - 1
        return np.where(again, found + len(self.start), found)

    def read_into(self, position: int, out: np.ndarray) -> list[int]:
        """Fills `out` with the tokens from stream `position` on, going round at the end; gives `locate`'s begins."""
        [(runs, begins)] = self.locate(np.array([position]), len(out))
        for at, begin, end in runs:
            self.reader.read_into(at, out[begin:end])
        return begins

    def long_documents(self, least: int) -> tuple[np.ndarray, np.ndarray, int]:
        """Documents of at least `least` tokens: stream positions [d], lengths [d]; and the longest of all."""
        found, longest = [], 0
        for at in range(0, self.reader.n_documents, CHUNK):
            start = self.reader.starts(np.arange(at, min(at + CHUNK, self.reader.n_documents) + 1))
            start, length = start[:-1], np.diff(start)
            range_ = self.start.searchsorted(start, "right") - 1
            offset = start - self.start[range_]
            inside = (range_ >= 0) & (offset < np.diff(self.position)[range_])
            longest = max(longest, int(length[inside].max(initial=0)))
            kept = inside & (length >= least)
            found.append((self.position[range_[kept]] + offset[kept], length[kept]))
        if not found:
            return np.empty(0, np.int64), np.empty(0, np.int64), 0
        return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found]), longest


def whole(reader: IndexedReader) -> TokenStream:
    """All documents of a file."""
    return TokenStream(reader, np.array([0]), np.array([reader.n_tokens]))
