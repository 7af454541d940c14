"""Where samples are in the files, found for many samples at once.

Finding one sample takes a pseudo-random number, a search among the ranges of its stream and two among the documents of
its file: in Python, more time than reading its tokens. As array operations over a few hundred samples it takes a
microsecond each. So when batches are read at a regular distance, as every loader does, the samples of the coming ones
are found ahead; any other access is found on demand, with the same result.
"""

import numpy as np

from megatron_taipan.data.blend import Blend
from megatron_taipan.data.piece import RowPiece
from megatron_taipan.data.samples import Samples
from megatron_taipan.data.stream import TokenSpan, TokenSpans

AHEAD_SAMPLES, AHEAD_TOKENS = 512, 1 << 21  # found together at most, or the samples of one batch


class SampleLocator:
    """Finds samples by number: of each the span of `piece`'s l tokens, and the one after them, the last label.

    Not for several threads at once.
    """

    def __init__(self, sources: list[Samples], blend: Blend, seq_len: int, piece: RowPiece):
        self.sources, self.blend = sources, blend
        self.first, self.begins = 0, [0] * len(sources)  # sample that the blend begins with; of each source, its first
        self.positions = piece.positions(seq_len)
        self.ahead = min(AHEAD_SAMPLES, AHEAD_TOKENS // len(self.positions))
        self._found: list[tuple[TokenSpans, dict[int, int]]] = []  # spans, and the number among them of each sample
        self._last = self._distance = 0  # first sample of the last batch, and how far it was from the one before

    def __call__(self, indices: list[int]) -> list[TokenSpan]:
        """The spans of the samples `indices`, in their order."""
        distance = indices[0] - self._last
        spans = self._of(indices)
        if spans is None:
            wanted = np.array(indices, np.int64)
            batches = self.ahead // len(indices)
            if distance == self._distance > 0 and batches > 1:  # the third batch at one distance; more will come
                wanted = (wanted + distance * np.arange(batches)[:, None]).reshape(-1)
            self._found = self.find(wanted)
            spans = self._of(indices)
            assert spans is not None
        self._last, self._distance = indices[0], distance
        return spans

    def _of(self, indices: list[int]) -> list[TokenSpan] | None:
        """The spans of samples that have been found, or None where one has not."""
        try:
            if len(self._found) == 1:
                found, number = self._found[0]
                return found.spans([number[index] for index in indices])
            spans: list[TokenSpan] = []
            for index in indices:
                found, number = next(one for one in self._found if index in one[1])
                spans += found.spans([number[index]])
            return spans
        except (KeyError, StopIteration):
            return None

    def find(self, indices: np.ndarray) -> list[tuple[TokenSpans, dict[int, int]]]:
        """Finds any samples, int64 [m]: for each source that they come from, its spans and their numbers by sample."""
        sources, numbers = self.blend.many(indices - self.first)
        found = []
        for k in np.unique(sources).tolist():  # of many sources few come
            source, mine = self.sources[k], np.flatnonzero(sources == k)
            rows = source.positions(numbers[mine] + self.begins[k])
            begin = (rows + self.positions.start) % source.stream.n_tokens
            spans = source.stream.locate(begin, len(self.positions) + 1)
            found.append((spans, dict(zip(indices[mine].tolist(), range(len(mine)), strict=True))))
        return found
