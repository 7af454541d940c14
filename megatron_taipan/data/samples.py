"""Samples of one source: which tokens sample j is made of, in every epoch."""

import numpy as np

from megatron_taipan.data.permutation import Permutation, derive_key
from megatron_taipan.data.stream import TokenStream
from megatron_taipan.errors import UserError

BLOCK = 4096  # entries of an order that are computed together where samples are asked for one after the other


class EpochOrder:
    """The order of one epoch: which of n slices sample j is, in a pseudo-random order that the key decides.

    A run asks for neighbouring samples, so their entries are computed a block at a time; single ones cost more each.
    """

    def __init__(self, n: int, key: int):
        self.permutation = Permutation(n, key)
        self._block, self._asked = -1, -1
        self._entries: list[int] = []

    def __call__(self, index: int) -> int:
        block, at = divmod(index, BLOCK)
        if block != self._block:
            if block != self._asked:  # maybe just one of it
                self._asked = block
                return self.permutation(index)
            entries = np.arange(block * BLOCK, min((block + 1) * BLOCK, self.permutation.n))
            self._block, self._entries = block, self.permutation.many(entries).tolist()
        return self._entries[at]


class PackedSamples:
    """Consecutive slices of a token stream, documents packed back to back, in a new pseudo-random order each epoch.

    The stream is a ring. Each epoch starts cutting it at another place, so the cuts through documents differ from
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
        self._epoch, self._order, self._turn = -1, EpochOrder(1, 0), 0

    def read_into(self, sample: int, out: np.ndarray) -> list[int]:
        """Fills `out` [seq_len + 1] with a sample's tokens; returns where in it other documents begin."""
        epoch, index = divmod(sample, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, EpochOrder(self.per_epoch, derive_key(self.key, epoch))
            self._turn = derive_key(self.key, epoch, "turn") % self.stream.n_tokens
        position = (self._turn + self._order(index) * self.seq_len) % self.stream.n_tokens
        return self.stream.read_into(position, out)


class LongSamples:
    """Samples that each lie inside one document, for training on long contexts.

    A document of n tokens gives (n - 1) // seq_len samples an epoch, shorter ones none. The tokens left over are
    skipped in front of a document's first sample, a number of them that changes from epoch to epoch.
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
        self._epoch, self._order = -1, EpochOrder(1, 0)

    def read_into(self, sample: int, out: np.ndarray) -> list[int]:
        """Fills `out` [seq_len + 1]; no other document ever begins in it."""
        epoch, index = divmod(sample, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, EpochOrder(self.per_epoch, derive_key(self.key, epoch))
        index = self._order(index)
        document = int(self.first.searchsorted(index, "right")) - 1
        slack = int(self.length[document] - 1) % self.seq_len
        skipped = derive_key(self.key, epoch, document) % (slack + 1)
        at = int(self.begin[document]) + skipped + (index - int(self.first[document])) * self.seq_len
        return self.stream.read_into(at, out)
