"""From a data configuration to batches: the dataset of numbered samples and the loader that hands them out.

The order is one endless list of samples 0, 1, 2, ... that depends on (seed, epoch, data) alone. A run's position in it
is the number of samples consumed; batch size, number of processes and number of steps only decide how many are taken at
once.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import count
from math import ceil
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from megatron_taipan.data.batch import Batch, BatchReader, BatchStorage, check_ids
from megatron_taipan.data.blend import MAX_PERIOD, Blend, exact_weights, whole_weights
from megatron_taipan.data.blend_weights import choose_weights, describe_blend
from megatron_taipan.data.ids import all_below, beyond_model, first_outside
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.data.loss_mask import attach_mask
from megatron_taipan.data.made_with import refuse_mixed, refuse_other
from megatron_taipan.data.permutation import derive_key
from megatron_taipan.data.piece import RowPiece
from megatron_taipan.data.sample_locator import SampleLocator
from megatron_taipan.data.samples import LongSamples, PackedSamples, Samples
from megatron_taipan.data.sources import find_pairs, open_reader
from megatron_taipan.data.split import split_documents
from megatron_taipan.data.workers import start_workers
from megatron_taipan.data_config import DataConfig, DataSource
from megatron_taipan.errors import UserError


class SampleDataset(Dataset):
    """Samples by number, any i >= 0, drawn from one or more weighted sources.

    `dataset[i]` holds `piece` of a sample of seq_len = L tokens: its l = L / piece.size tokens from position
    piece.rank * l on, by default all of them.
        tokens     int64 [l]
        labels     int64 [l]    the next token; of the piece's last token the first one of the next piece
        loss_mask  float32 [l]  0 where the label belongs to another document, where the source's loss mask is 0, and,
                                if the source has a loss mask, where the label's document begins before the sample
        seq_idx    int32 [l]    number of the document within the piece, from 0; all 0 if documents are not masked
        sample     int64 []     i
    and of rows in several pieces only:
        document_start  int64 []  position in the sample, from 0 to piece.rank * l, at which the document of the piece's
                                  first token begins; 0 if it begins before the sample, or documents are not masked

    Attributes:
        sources: the samples of each source, in the order of the configuration.
        seq_len: L, whatever the piece.
        fingerprint: hash of everything that decides which tokens sample i holds (of a .bin only what `IndexedReader`
            hashes), not of the piece; a resume with another fingerprint must be refused.

    Raises:
        UserError: L is not a multiple of piece.size.
    """

    def __init__(
        self,
        sources: list[Samples],
        weights: list[float],
        *,
        seq_len: int,
        vocab_size: int,
        mask_documents: bool,
        fingerprint: str,
        piece: RowPiece,
    ):
        self.sources, self.blend = sources, Blend(weights)
        self.seq_len, self.vocab_size, self.mask_documents = seq_len, vocab_size, mask_documents
        self.fingerprint, self.piece = fingerprint, piece
        self.before = [Fraction(0)] * len(sources)  # how often each source was read in the stages before
        self._locate = SampleLocator(sources, self.blend, seq_len, piece)
        self._read = BatchReader(seq_len, mask_documents, piece)

    def go_on(self, first: int, read: Mapping[str, Fraction]) -> None:
        """Makes sample `first` the one that the blend begins with, and lets each source go on where it was left.

        A source that was cut in the same way (seq_len, one_document) goes on with exactly its next sample. Of one
        that was cut otherwise the epochs are kept: what is left of the one under way are other cuts of the same
        documents, so that no sample comes again, but tokens of it may.

        Args:
            read: what `read_after` gave at the end of the stage before.
        """
        names = [_name(source) for source in self.sources]
        self.before = [read.get(name, Fraction(0)) for name in names]
        self._locate.first = first
        self._locate.begins = [ceil(n * s.per_epoch) for n, s in zip(self.before, self.sources, strict=True)]

    def read_after(self, samples: int) -> dict[str, Fraction]:
        """How often each source has been read, by the fingerprint of its data, after `samples` samples of the run."""
        drawn, begins = self.blend.drawn(samples - self._locate.first), self._locate.begins
        each = zip(self.sources, self.before, begins, drawn, strict=True)
        # one of which nothing was drawn keeps its place, which another cut would round up
        return {_name(s): Fraction(begin + n, s.per_epoch) if n else before for s, before, begin, n in each}

    def __len__(self) -> int:
        """Samples in one epoch of all sources together."""
        return sum(source.per_epoch for source in self.sources)

    def __getitem__(self, index: int) -> Batch:
        return {name: values[0] for name, values in self.batch([index]).items()}

    def __getitems__(self, indices: list[int]) -> BatchStorage | UserError:
        """What a worker of DataLoader calls for a list of indices: the trainer receives what `batch` returns, or the
        error that `batch` would raise, since DataLoader puts the worker's traceback into any error raised there."""
        try:
            return self._read(self._locate(indices), indices, self.vocab_size)
        except UserError as error:
            return error

    def batch(self, indices: list[int]) -> Batch:
        """Several samples stacked: every tensor gets a first dimension [b]."""
        return self._read(self._locate(indices), indices, self.vocab_size).batch()

    def tokens(self, index: int) -> tuple[np.ndarray, list[int]]:
        """The l + 1 stored ids of the piece of one sample, and where other documents begin in them.

        Raises:
            UserError: an id is beyond the model's vocabulary.
        """
        [span] = self._locate([index])
        out = np.empty(self.seq_len // self.piece.size + 1, span.reader.dtype)
        span.read_into(out.data.cast("B"))
        check_ids([span], out, self.vocab_size)
        return out, span.doc_starts

    def describe(self, chosen: list[DataSource], samples: int) -> str:
        """How the sources, configured as `chosen`, are weighted, and what a run of `samples` samples reads of each."""
        return describe_blend(chosen, self.sources, self.blend.drawn(samples))

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each source has been read after `samples` samples of the run, by its prefix."""
        drawn = self.blend.drawn(samples - self._locate.first)
        each = zip(self.sources, self.before, drawn, strict=True)
        return {s.stream.reader.prefix: float(before) + n / s.per_epoch for s, before, n in each}


def build_dataset(
    data: DataConfig, split: Literal["train", "valid"], vocab_size: int, piece: RowPiece = RowPiece()
) -> SampleDataset:
    """The dataset of one split.

    Args:
        data: what to read; without `data.valid` each training source holds out `data.valid_fraction` of its documents.
        vocab_size: ids of the model's vocabulary; a larger id in the data is refused, here where the first part of a
            file shows it, otherwise when the sample is read.
        piece: which part of every row to read; which tokens a row holds does not depend on it.

    A source of a blend from which nothing can be held out is left out of validation, with a warning.

    Raises:
        UserError: files missing or damaged, too little data, no validation data, ids beyond the vocabulary, data made
            with several tokenizers or with another than data.tokenizer, data.seq_len not a multiple of piece.size.
    """
    own = data.valid if split == "valid" else None
    chosen = data.train if own is None else own
    _refuse_duplicates(chosen, f"data.{'train' if own is None else 'valid'}")
    prefixes = [source.prefix for source in [*data.train, *(data.valid or [])]]
    refuse_mixed(prefixes)
    if data.tokenizer is not None:
        refuse_other(prefixes, data.tokenizer, "data.tokenizer")
    if split == "valid" and own is None and data.valid_fraction == 0:
        raise UserError("there is no validation data: set data.valid, or data.valid_fraction above 0")
    held_out = data.valid_fraction if data.valid is None else 0.0
    sources: list[Samples] = []
    kept: list[DataSource] = []
    identity: list[object] = []
    for source in chosen:
        reader = open_reader(source.prefix)
        if not reader.n_tokens:
            raise UserError(f"{source.prefix}.bin holds no tokens; tokenize a corpus with text in it")
        _check_ids(reader, vocab_size)
        attach_mask(reader, source.loss_mask, data)
        try:
            samples = _samples(reader, data, split, held_out, blended=len(chosen) > 1)
        except NothingHeldOut as nothing:
            if source is chosen[-1] and not sources:
                raise
            warnings.warn(f"{nothing}; {source.prefix} is left out of validation", stacklevel=2)
            continue
        sources.append(samples)
        kept.append(source)
        identity += [reader.fingerprint, source.weight]
        if reader.loss_mask is not None:
            identity += ["loss mask", reader.loss_mask.fingerprint]
    weights = choose_weights(kept, sources)
    if sum(exact_weights(weights)) > MAX_PERIOD:  # their rounding decides the order too, and was different once
        identity += whole_weights(weights)
    identity += [split, data.seq_len, data.seed, held_out, data.one_document]
    return SampleDataset(
        sources,
        weights,
        seq_len=data.seq_len,
        vocab_size=vocab_size,
        mask_documents=data.mask_documents,
        fingerprint=f"{derive_key(*identity):016x}",
        piece=piece,
    )


def _name(source: Samples) -> str:
    return source.stream.reader.fingerprint


def make_loader(
    dataset: SampleDataset,
    *,
    start: int,
    global_batch: int,
    micro_batch: int,
    dp_rank: int,
    dp_size: int,
    workers: int = 0,
) -> Iterator[Batch]:
    """This rank's micro-batches, without end, from sample number `start` on.

    Counting steps from 0, global batch s is samples start + s * global_batch + [0, global_batch). Its micro-batch k
    of rank r is samples k * dp_size * micro_batch + r * micro_batch + [0, micro_batch) of these.

    Raises:
        UserError: the global batch is not a whole number of micro-batches of all ranks; or workers do not start.
    """
    together = dp_size * micro_batch
    if global_batch % together:
        raise UserError(
            f"train.global_batch={global_batch} is not a multiple of data-parallel size * train.micro_batch = {dp_size}"
            f" * {micro_batch} = {together} (remainder {global_batch % together})"
        )
    first = start + dp_rank * micro_batch

    def batches() -> Iterator[list[int]]:
        return (list(range(at, at + micro_batch)) for at in count(first, together))

    if not workers:
        return map(dataset.batch, batches())
    return _raise_errors(start_workers(dataset, batches, workers))


def _raise_errors(batches: Iterator[Any]) -> Iterator[Batch]:
    for batch in batches:
        if isinstance(batch, UserError):
            raise batch
        yield batch


class NothingHeldOut(UserError):
    """A source has no validation sample."""


def _samples(reader: IndexedReader, data: DataConfig, split: str, held_out: float, blended: bool) -> Samples:
    """The samples of one source: of its training documents, or of the held-out ones.

    Raises:
        NothingHeldOut: there are none for validation. A blend may do without this source, and trains on all of a source
            that is a single document; a source that is not in a blend cannot use one document for both.
    """
    kind = LongSamples if data.one_document else PackedSamples
    if blended and held_out and reader.n_documents < 2:
        if split == "valid":
            raise NothingHeldOut(
                f"validation: {reader.prefix} has 1 document, so none is held out; set data.valid to another dataset"
            )
        held_out = 0.0
    train, valid = split_documents(reader, held_out)
    if split == "train" or valid is None:
        return kind(train, data.seq_len, data.seed)
    try:
        return kind(valid, data.seq_len, data.seed)
    except UserError as error:
        raise NothingHeldOut(
            f"validation: {error}; or raise data.valid_fraction={held_out}, or set data.valid to another dataset"
        ) from error


def _refuse_duplicates(sources: list[DataSource], where: str) -> None:
    """The same data twice would draw the same samples twice at the same time."""
    seen: dict[str, str] = {}
    for source in sources:
        for pair in find_pairs(source.prefix):
            path = os.path.realpath(pair + ".bin")
            if path in seen:
                also = f" ({seen[path]} holds {pair} too)" if pair != source.prefix else ""
                raise UserError(f"{where} lists {source.prefix} twice{also}; list it once with the sum of the weights")
            seen[path] = source.prefix


def _check_ids(reader: IndexedReader, vocab_size: int) -> None:
    """Checks the first 16 million ids for some that the model does not have; every batch is checked again."""
    if reader.dtype.kind == "u" and 1 << 8 * reader.dtype.itemsize <= vocab_size:
        return
    count = 1 << 20
    for at in range(0, min(reader.n_tokens, 16 * count), count):
        out = np.empty(min(count, reader.n_tokens - at), reader.dtype)
        reader.read_into(at, out)
        if not all_below(out, vocab_size):
            raise beyond_model(reader, at + first_outside(out, vocab_size), vocab_size)
