"""Several pairs read as one, documents back to back: the shards of one output."""

from bisect import bisect_right
from hashlib import blake2b

import numpy as np

from megatron_taipan.data.indexed import CODES, HEADER, MAGIC, IndexedReader
from megatron_taipan.errors import UserError


class Shards(IndexedReader):
    """Random access to the documents of several pairs, numbered on from one to the next.

    The fingerprint is that of the one pair that `data_prep merge` makes of them, so the order of samples and the
    held-out documents do not change when shards are merged, or a pair is split into shards.

    Attributes:
        pairs: the shards, in order; `prefix` is the name of all of them together.

    Raises:
        UserError: they hold ids of different types.
    """

    def __init__(self, prefix: str, pairs: list[IndexedReader]):
        self.prefix, self.pairs, self.dtype = prefix, pairs, pairs[0].dtype
        self.loss_mask = None
        for pair in pairs:
            if pair.dtype != self.dtype:
                raise UserError(
                    f"{pair.prefix} holds {pair.dtype} and {pairs[0].prefix} {self.dtype}, so they are not shards of"
                    " one output; name them as separate sources"
                )
        documents, tokens = [pair.n_documents for pair in pairs], [pair.n_tokens for pair in pairs]
        self._documents = np.cumsum([0, *documents])  # [s + 1], in front of each shard
        self._tokens: list[int] = np.cumsum([0, *tokens]).tolist()
        self.n_documents = self.n_sequences = int(self._documents[-1])
        self.n_tokens = self._tokens[-1]
        self.bin_bytes = self.n_tokens * self.dtype.itemsize
        self.fingerprint = self._hash()

    def _hash(self) -> str:
        """The hash that `IndexedReader` computes of a pair with these documents, one sequence each."""
        digest = blake2b(
            HEADER.pack(MAGIC, 1, CODES[self.dtype], self.n_documents, self.n_documents + 1), digest_size=16
        )
        for pair in self.pairs:
            for lengths in pair.lengths():
                digest.update(lengths.astype("<i4").data)
        digest.update(self.bin_bytes.to_bytes(8, "little"))
        for block in range(16):
            start = block * self.bin_bytes // 16
            out = bytearray(min(4096, self.bin_bytes - start))
            self._read(start, memoryview(out))
            digest.update(out)
        return digest.hexdigest()

    def __getstate__(self) -> dict:
        return self.__dict__.copy()  # each pair opens its own files again

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)

    def start(self, document: int) -> int:
        return int(self.starts(np.array([document]))[0])

    def starts(self, documents: np.ndarray) -> np.ndarray:
        # the last of several shards that begin with one document is the one that holds it: the others are empty
        shard = np.minimum(self._documents.searchsorted(documents, "right"), len(self.pairs)) - 1
        out = np.empty(len(documents), np.int64)
        for s in np.unique(shard).tolist():
            mine = shard == s
            out[mine] = self.pairs[s].starts(documents[mine] - self._documents[s]) + self._tokens[s]
        return out

    def find(self, position: int) -> int:
        shard = self._shard(position)
        return int(self._documents[shard]) + self.pairs[shard].find(position - self._tokens[shard])

    def where(self, position: int) -> tuple[str, int, int]:
        shard = self._shard(position)
        return self.pairs[shard].where(position - self._tokens[shard])

    def read_bytes(self, position: int, out: memoryview) -> None:
        self._read(position * self.dtype.itemsize, out)

    def _read(self, start: int, out: memoryview) -> None:
        """Fills `out` with the bytes from byte `start` of all the .bin files on."""
        size = self.dtype.itemsize
        while len(out):
            shard = self._shard(start // size)
            here = out[: self._tokens[shard + 1] * size - start]
            self.pairs[shard].read_raw(start - self._tokens[shard] * size, here)
            start, out = start + len(here), out[len(here) :]

    def _shard(self, position: int) -> int:
        """The shard that holds the token at `position`."""
        return bisect_right(self._tokens, position) - 1
