"""Which documents are held out for validation.

Documents are picked at random, not by position: corpora are often sorted (by date, by site), and the last percent of
such a file is another distribution. The choice depends on the data alone, not on the seed of the sample order, so that
a run with another seed never trains on what an earlier run validated on.
"""

import numpy as np

from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.data.permutation import Permutation, derive_key
from megatron_taipan.data.stream import TokenStream, whole
from megatron_taipan.errors import UserError


def split_documents(reader: IndexedReader, fraction: float) -> tuple[TokenStream, TokenStream | None]:
    """The streams of the documents to train on and of the held-out ones (None where fraction is 0)."""
    if fraction == 0:
        return whole(reader), None
    documents = held_out_documents(reader, fraction)
    start, stop = reader.starts(documents), reader.starts(documents + 1)
    train = TokenStream(reader, np.concatenate([[0], stop]), np.concatenate([start, [reader.n_tokens]]))
    return train, TokenStream(reader, start, stop)


def held_out_documents(reader: IndexedReader, fraction: float) -> np.ndarray:
    """Numbers of the held-out documents, rising: int64 [round(fraction * n)]; at least one, at most all but one."""
    n = reader.n_documents
    if n < 2:
        raise UserError(
            f"{reader.prefix} has {n} document(s), so none can be held out (data.valid_fraction={fraction});"
            " set data.valid to another dataset, or data.valid_fraction=0"
        )
    held = min(max(1, round(fraction * n)), n - 1)
    return np.sort(Permutation(n, derive_key("held out", reader.fingerprint)).many(np.arange(held)))
