"""Filling a batch from the token spans of its samples.

A sample of L tokens is 2 L bytes in the file and 24 L bytes in a batch, so what counts is how often memory is touched:
ids are read into a small buffer that stays in the processor's cache and go from there into the batch, once for the
tokens and once for the labels, and everything else is written once.
"""

import weakref
from itertools import groupby
from typing import Any

import numpy as np
import torch

from megatron_taipan.data.ids import all_below, beyond_model, first_outside
from megatron_taipan.data.loss_mask import check_mask
from megatron_taipan.data.stream import TokenSpan

Batch = dict[str, torch.Tensor]
POOL_SIZE = 4  # buffers that are kept: a step with one micro-batch needs two, the new one beside the last
READ_BYTES = 1 << 17  # bytes of ids read before they are spread over the batch, at least one sample


class BatchReader:
    """Reads batches of samples of seq_len = L tokens. Not for several threads at once.

    Args:
        mask_documents: number the documents within a sample in `seq_idx`.
    """

    def __init__(self, seq_len: int, mask_documents: bool):
        self.seq_len, self.mask_documents = seq_len, mask_documents
        self._buffers: dict[np.dtype, tuple[np.ndarray, list[memoryview]]] = {}
        self._pool = BufferPool()

    def __call__(self, spans: list[TokenSpan], indices: list[int], vocab_size: int) -> "BatchStorage":
        """The samples at `spans`, numbered `indices`, as one batch.

        Raises:
            UserError: an id is negative or not below vocab_size, or a loss mask holds something else than 0 and 1.
        """
        storage = BatchStorage(len(spans), self.seq_len, self._pool(BatchStorage.size(len(spans), self.seq_len)))
        arrays = storage.arrays
        tokens, labels = arrays["tokens"], arrays["labels"]
        row = 0
        for dtype, group in groupby(spans, _dtype):  # sources may store ids in different types
            left = list(group)
            buffer, views = self._buffer(dtype)
            while left:
                now, left = left[: len(buffer)], left[len(buffer) :]
                for span, view in zip(now, views, strict=False):
                    span.read_into(view)
                ids = buffer[: len(now)]
                check_ids(now, ids, vocab_size)
                tokens[row : row + len(now)], labels[row : row + len(now)] = ids[:, :-1], ids[:, 1:]
                row += len(now)
        arrays["loss_mask"].fill(1)
        arrays["seq_idx"].fill(0)
        mask, numbers = arrays["loss_mask"].reshape(-1), arrays["seq_idx"].reshape(-1)
        for row, span in enumerate(spans):
            first, stop = row * self.seq_len, (row + 1) * self.seq_len
            if span.reader.loss_mask is not None:
                mask[first:stop] = label_mask(span, self.seq_len)
            for begin in span.doc_starts:
                mask[first + begin - 1] = 0
            if self.mask_documents:
                number_documents(span.doc_starts, numbers, first, stop)
        arrays["sample"][:] = indices
        return storage

    def _buffer(self, dtype: np.dtype) -> tuple[np.ndarray, list[memoryview]]:
        """Room for the ids of some samples, [>= 1, L + 1], and the bytes of each of its rows."""
        if dtype not in self._buffers:
            rows = max(1, READ_BYTES // ((self.seq_len + 1) * dtype.itemsize))
            room = np.empty((rows, self.seq_len + 1), dtype)
            self._buffers[dtype] = room, [row.data.cast("B") for row in room]
        return self._buffers[dtype]

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_buffers": {}, "_pool": BufferPool()}


class BufferPool:
    """Buffers that are used again as soon as no array or tensor refers to them any more.

    The allocator would give them back to the system, which clears the pages of new ones; that takes longer than
    filling them.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[bytearray, weakref.ref[np.ndarray]]] = []

    def __call__(self, size: int) -> np.ndarray:
        """A buffer of `size` bytes, uint8 [size], in use for as long as this array, or one made from it, lives."""
        for at, (memory, array) in enumerate(self._kept):
            if len(memory) == size and array() is None:
                del self._kept[at]
                break
        else:
            memory = bytearray(size)
        lent = np.frombuffer(memory, np.uint8)  # arrays made from it hold it, since it is the first that is an array
        self._kept = [(memory, weakref.ref(lent)), *self._kept[: POOL_SIZE - 1]]
        return lent


class BatchStorage:
    """One batch of b samples in one buffer, so that a loader's worker sends one file descriptor."""

    def __init__(self, b: int, seq_len: int, memory: np.ndarray):
        self.b, self.seq_len, self.memory = b, seq_len, memory
        shape, n = (b, seq_len), b * seq_len
        self.arrays = {  # what `SampleDataset` promises
            "tokens": np.ndarray(shape, np.int64, memory, 0),
            "labels": np.ndarray(shape, np.int64, memory, 8 * n),
            "loss_mask": np.ndarray(shape, np.float32, memory, 16 * n),
            "seq_idx": np.ndarray(shape, np.int32, memory, 20 * n),
            "sample": np.ndarray(b, np.int64, memory, 24 * n),
        }

    @staticmethod
    def size(b: int, seq_len: int) -> int:
        """Bytes of a batch."""
        return b * (24 * seq_len + 8)

    def batch(self) -> Batch:
        """The arrays as tensors."""
        return {name: torch.from_numpy(array) for name, array in self.arrays.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        """Unpickled in another process, it is the batch."""
        return _arrived, (torch.from_numpy(self.memory), self.b, self.seq_len)


def _arrived(memory: torch.Tensor, b: int, seq_len: int) -> Batch:
    return BatchStorage(b, seq_len, memory.numpy()).batch()


def _dtype(span: TokenSpan) -> np.dtype:
    return span.reader.dtype


def number_documents(doc_starts: list[int], out: np.ndarray, first: int, stop: int) -> None:
    """Numbers the documents of one sample in `out[first:stop]`, which holds zeros.

    The others begin at `doc_starts`, rising and counted from `first`; the last may be at `stop`.
    """
    if len(doc_starts) < 16:
        for number, begin in enumerate(doc_starts, 1):
            out[first + begin : stop] = number
    else:
        length = stop - first
        counts = np.diff([0, *doc_starts, max(length, doc_starts[-1])])
        out[first:stop] = np.repeat(np.arange(len(doc_starts) + 1), counts)[:length]


def label_mask(span: TokenSpan, seq_len: int) -> np.ndarray:
    """Which labels the loss mask of a span's source marks: uint8 [L]; the label of position t is token t + 1.

    Labels of a document that begins before the sample are not marked: the model would have to answer without having
    seen the question.
    """
    mask = span.reader.loss_mask
    assert mask is not None
    marked = np.empty(seq_len + 1, mask.dtype)
    TokenSpan(mask, span.position, span.runs, span.doc_starts).read_into(marked.data)
    check_mask(mask, marked)
    if span.reader.start(span.reader.find(span.position)) != span.position:
        marked[: span.doc_starts[0] if span.doc_starts else None] = 0
    return marked[1:]


def check_ids(spans: list[TokenSpan], ids: np.ndarray, vocab_size: int) -> None:
    """Refuses ids [p, L + 1] (or [L + 1] of one span) beyond the vocabulary."""
    if all_below(ids, vocab_size):
        return
    for span, row in zip(spans, ids.reshape(len(spans), -1), strict=True):
        if not all_below(row, vocab_size):
            raise beyond_model(span.reader, span.token(first_outside(row, vocab_size)), vocab_size)
