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
from megatron_taipan.data.piece import RowPiece
from megatron_taipan.data.stream import TokenSpan

Batch = dict[str, torch.Tensor]
POOL_SIZE = 4  # buffers that are kept: a step with one micro-batch needs two, the new one beside the last
READ_BYTES = 1 << 17  # bytes of ids read before they are spread over the batch, at least one sample
READ_SAMPLES = 256  # of short ones, each of which has a view of its own


class BatchReader:
    """Reads batches of the l tokens of `piece` of samples of seq_len = L tokens. Not for several threads at once.

    Args:
        mask_documents: number the documents within a piece in `seq_idx`.
    """

    def __init__(self, seq_len: int, mask_documents: bool, piece: RowPiece):
        self.positions = piece.positions(seq_len)  # in a row; of a whole row from 0 on
        self.length, self.in_pieces, self.mask_documents = len(self.positions), piece.size > 1, mask_documents
        self._buffers: dict[np.dtype, tuple[np.ndarray, list[memoryview]]] = {}
        self._pool = BufferPool()

    def __call__(self, spans: list[TokenSpan], indices: list[int], vocab_size: int) -> "BatchStorage":
        """The pieces at `spans`, l + 1 tokens each, of the samples numbered `indices`, as one batch.

        Raises:
            UserError: an id is negative or not below vocab_size, or a loss mask holds something else than 0 and 1.
        """
        shape = len(spans), self.length, self.in_pieces
        storage = BatchStorage(*shape, self._pool(BatchStorage.size(*shape)))
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
            first, stop = row * self.length, (row + 1) * self.length
            if span.reader.loss_mask is not None:
                mask[first:stop] = label_mask(span, self.positions)
            for begin in span.doc_starts:
                mask[first + begin - 1] = 0
            if self.mask_documents:
                number_documents(span.doc_starts, numbers, first, stop)
        arrays["sample"][:] = indices
        if self.in_pieces:
            begin = self.positions.start
            starts = [max(0, begin - span.tokens_before()) if self.mask_documents else 0 for span in spans]
            arrays["document_start"][:] = starts
        return storage

    def _buffer(self, dtype: np.dtype) -> tuple[np.ndarray, list[memoryview]]:
        """Room for the ids of some samples, [>= 1, l + 1], and the bytes of each of its rows."""
        if dtype not in self._buffers:
            rows = min(max(1, READ_BYTES // ((self.length + 1) * dtype.itemsize)), READ_SAMPLES)
            room = np.empty((rows, self.length + 1), dtype)
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
    """One batch of b samples in one buffer, so that a loader's worker sends one file descriptor.

    Args:
        length: l, tokens of each sample.
        in_pieces: they are pieces of the samples, so the batch also says where the documents begin that they go on.
        memory: uint8 [size(b, length, in_pieces)].
    """

    def __init__(self, b: int, length: int, in_pieces: bool, memory: np.ndarray):
        self.shape, self.memory = (b, length, in_pieces), memory
        shape, n = (b, length), b * length
        self.arrays = {  # what `SampleDataset` promises
            "tokens": np.ndarray(shape, np.int64, memory, 0),
            "labels": np.ndarray(shape, np.int64, memory, 8 * n),
            "loss_mask": np.ndarray(shape, np.float32, memory, 16 * n),
            "seq_idx": np.ndarray(shape, np.int32, memory, 20 * n),
            "sample": np.ndarray(b, np.int64, memory, 24 * n),
        }
        if in_pieces:
            self.arrays["document_start"] = np.ndarray(b, np.int64, memory, 24 * n + 8 * b)

    @staticmethod
    def size(b: int, length: int, in_pieces: bool) -> int:
        """Bytes of a batch."""
        return b * (24 * length + (16 if in_pieces else 8))

    def batch(self) -> Batch:
        """The arrays as tensors."""
        return {name: torch.from_numpy(array) for name, array in self.arrays.items()}

    def __reduce__(self) -> tuple[Any, ...]:
        """Unpickled in another process, it is the batch."""
        return _arrived, (torch.from_numpy(self.memory), *self.shape)


def _arrived(memory: torch.Tensor, b: int, length: int, in_pieces: bool) -> Batch:
    return BatchStorage(b, length, in_pieces, memory.numpy()).batch()


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


def label_mask(span: TokenSpan, positions: range) -> np.ndarray:
    """Which labels the loss mask of a span's source marks: uint8 [l]; the label of token t of the span is t + 1.

    Labels of a document that begins before the sample are not marked: the model would have to answer without having
    seen the question.

    Args:
        span: l + 1 tokens.
        positions: of the first l of them in the sample.
    """
    mask = span.reader.loss_mask
    assert mask is not None
    marked = np.empty(len(positions) + 1, mask.dtype)
    TokenSpan(mask, span.position, span.runs, span.doc_starts).read_into(marked.data)
    check_mask(mask, marked)
    if span.tokens_before() > positions.start:
        marked[: span.doc_starts[0] if span.doc_starts else None] = 0
    return marked[1:]


def check_ids(spans: list[TokenSpan], ids: np.ndarray, vocab_size: int) -> None:
    """Refuses ids [p, l + 1] (or [l + 1] of one span) beyond the vocabulary."""
    if all_below(ids, vocab_size):
        return
    for span, row in zip(spans, ids.reshape(len(spans), -1), strict=True):
        if not all_below(row, vocab_size):
            raise beyond_model(span.reader, span.token(first_outside(row, vocab_size)), vocab_size)
