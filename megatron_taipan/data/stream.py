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

    def read_into(self, position: int, out: np.ndarray) -> list[int]:
        """Fills `out` with the tokens from stream `position` on, going round at the end.

        Returns:
            the indices of `out`, above 0 and rising, at which another document begins.
        """
        begins: list[int] = []
        filled = 0
        while filled < len(out):
            range_ = 0 if len(self.start) == 1 else int(self.position.searchsorted(position, "right")) - 1
            count = min(int(self.position[range_ + 1]) - position, len(out) - filled)
            at = int(self.start[range_]) + position - int(self.position[range_])
            self.reader.read_into(at, out[filled : filled + count])
            if filled:
                begins.append(filled)
            begins += [begin - at + filled for begin in self.reader.boundaries(at, at + count)]
            filled += count
            position = (position + count) % self.n_tokens
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
