"""Samples of one source: which tokens sample j consists of, in every epoch."""

from collections.abc import Callable

import numpy as np

from megatron_taipan.data.permutation import Permutation, derive_key
from megatron_taipan.data.stream import TokenStream
from megatron_taipan.errors import UserError


class PackedSamples:
    """Consecutive slices of a token stream, documents packed back to back, in a new pseudo-random order each epoch.

    The stream is a ring. Each epoch starts cutting it at another position, so the cuts through documents differ from
    epoch to epoch, and visits the slices in another order. Within an epoch every token is an input at most once and
    only the n_tokens % seq_len tokens of the ring's last, incomplete slice are left out.

    Why slices of the file's own order rather than of shuffled documents: a shuffled order of 50 million documents is
    a table of hundreds of megabytes an epoch, made or loaded by every process; this needs none, opens at once at any
    corpus size and any number of epochs, and reads one run of bytes a sample. Documents are still visited in random
    order; just those that share a sample are neighbours in the file, and packed documents do not see each other.
    """

    def __init__(self, stream: TokenStream, seq_len: int, seed: int):
        if stream.n_tokens < seq_len + 1:
            raise UserError(
                f"{stream.reader.prefix} has {stream.n_tokens} tokens here, and one sample takes data.seq_len + 1 ="
                f" {seq_len + 1}; add text, or lower data.seq_len"
            )
        self.stream, self.seq_len = stream, seq_len
        self.key = derive_key("samples", seed, stream.reader.fingerprint)
        self.per_epoch = stream.n_tokens // seq_len
        self._epoch, self._order, self._turn = -1, Permutation(1, 0), 0

    def positions(self, samples: np.ndarray) -> np.ndarray:
        """Where in the stream samples begin: int64 [m] -> int64 [m]."""
        return by_epoch(samples, self.per_epoch, self._in_epoch)

    def _in_epoch(self, epoch: int, index: np.ndarray) -> np.ndarray:
        if epoch != self._epoch:
            self._order = Permutation(self.per_epoch, derive_key(self.key, epoch))
            self._turn = derive_key(self.key, epoch, "turn") % self.stream.n_tokens
            self._epoch = epoch
        return (self._turn + self._order.many(index) * self.seq_len) % self.stream.n_tokens


class LongSamples:
    """Samples that are each inside one document, for training on long contexts.

    A document of n tokens gives (n - 1) // seq_len samples an epoch, so a document of seq_len tokens or fewer gives
    none. Some of the tokens left over are skipped in front of a document's first sample, a number of them that changes
    from epoch to epoch.
    """

    def __init__(self, stream: TokenStream, seq_len: int, seed: int):
        self.stream, self.seq_len = stream, seq_len
        self.key = derive_key("long samples", seed, stream.reader.fingerprint)
        self.begin, self.length, longest = stream.long_documents(seq_len + 1)  # [d], [d], stream positions and tokens
        if not len(self.begin):
            raise UserError(
                f"{stream.reader.prefix} has no document of more than data.seq_len = {seq_len} tokens (the longest has"
                f" {longest}); lower data.seq_len or set data.one_document=false"
            )
        self.first = np.concatenate([[0], np.cumsum((self.length - 1) // seq_len)])  # [d + 1], in samples
        self.per_epoch = int(self.first[-1])
        self._epoch, self._order = -1, Permutation(1, 0)

    def positions(self, samples: np.ndarray) -> np.ndarray:
        """Where in the stream samples begin: int64 [m] -> int64 [m]."""
        return by_epoch(samples, self.per_epoch, self._in_epoch)

    def _in_epoch(self, epoch: int, index: np.ndarray) -> np.ndarray:
        if epoch != self._epoch:
            self._order = Permutation(self.per_epoch, derive_key(self.key, epoch))
            self._epoch = epoch
        index = self._order.many(index)
        document = self.first.searchsorted(index, "right") - 1
        slack = (self.length[document] - 1) % self.seq_len
        keys = [derive_key(self.key, epoch, number) for number in document.tolist()]
        skipped = (np.array(keys, np.uint64) % (slack + 1).astype(np.uint64)).astype(np.int64)
        return self.begin[document] + skipped + (index - self.first[document]) * self.seq_len


Samples = PackedSamples | LongSamples


def by_epoch(samples: np.ndarray, per_epoch: int, in_epoch: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
    """Puts together what `in_epoch(epoch, samples of it counted from its start)` gives: int64 [m] -> int64 [m]."""
    epochs, index = np.divmod(samples, per_epoch)
    if epochs[0] == epochs[-1] and (epochs == epochs[0]).all():
        return in_epoch(int(epochs[0]), index)
    out = np.empty(len(samples), np.int64)
    for epoch in np.unique(epochs).tolist():
        mine = epochs == epoch
        out[mine] = in_epoch(epoch, index[mine])
    return out
