"""Where samples lie in the files, found for many samples at once.

To find one sample takes a pseudo-random number, a search among the ranges of its stream and two among the documents of
its file: more time in Python than the reading of its tokens. As array operations over a few hundred samples the same
takes a microsecond each. So whoever reads batches at a regular distance, as every loader does, has the coming ones
found ahead; any other access is found as it comes, and the result is the same.
"""

from dataclasses import dataclass

import numpy as np

from megatron_taipan.data.blend import Blend
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.data.samples import Samples

AHEAD_SAMPLES, AHEAD_TOKENS = 512, 1 << 21  # found together at most, or the samples of one batch


@dataclass(slots=True)
class Place:
    """One sample: its file, its runs of tokens as (position in the file, [begin, end) in the sample), and where in it
    other documents begin (above 0, rising)."""

    reader: IndexedReader
    runs: list[tuple[int, int, int]]
    begins: list[int]

    def read_into(self, out: np.ndarray) -> None:
        """Fills `out` [seq_len + 1], contiguous and of the file's type."""
        for position, begin, end in self.runs:
            self.reader.read_into(position, out[begin:end])


class Places:
    """Finds samples by number. Not for several threads at once."""

    def __init__(self, sources: list[Samples], blend: Blend, seq_len: int):
        self.sources, self.blend = sources, blend
        self.ahead = min(AHEAD_SAMPLES, AHEAD_TOKENS // seq_len)
        self._found: dict[int, Place] = {}
        self._last = self._distance = 0  # first sample of the last batch, and how far it was from the one before

    def __call__(self, indices: list[int]) -> list[Place]:
        """The places of the samples `indices`, in their order."""
        distance = indices[0] - self._last
        try:
            places = list(map(self._found.__getitem__, indices))
        except KeyError:
            wanted = np.array(indices, np.int64)
            batches = self.ahead // len(indices)
            if distance == self._distance > 0 and batches > 1:  # the third batch at one distance; more will come
                wanted = (wanted + distance * np.arange(batches)[:, None]).reshape(-1)
            found = self.find(wanted)
            self._found = dict(zip(wanted.tolist(), found, strict=True))
            places = found[: len(indices)]
        self._last, self._distance = indices[0], distance
        return places

    def find(self, indices: np.ndarray) -> list[Place]:
        """The places of any samples: int64 [m] -> m places."""
        sources, numbers = self.blend.many(indices)
        places: list[Place | None] = [None] * len(indices)
        for k, source in enumerate(self.sources):
            mine = np.flatnonzero(sources == k)
            if len(mine):
                stream = source.stream
                found = stream.locate(source.positions(numbers[mine]), source.seq_len + 1)
                for at, (runs, begins) in zip(mine.tolist(), found, strict=True):
                    places[at] = Place(stream.reader, runs, begins)
        return [place for place in places if place is not None]
