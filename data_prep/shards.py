"""Writing a .bin/.idx pair, with its loss mask if it has one, out of ranges of other .bin files; the bytes move inside
the kernel."""

import errno
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep import manifest
from megatron_taipan.data import loss_mask
from megatron_taipan.data.indexed import CHUNK, MAX_SEQUENCE, IndexedReader, commit, sync_and_close, write_index
from megatron_taipan.data.loss_mask import find_mask
from megatron_taipan.data.shards import Shards
from megatron_taipan.data.sources import open_reader
from megatron_taipan.errors import UserError

COPY_AT_ONCE = 1 << 30


class DocumentSource:
    """A pair whose documents are taken, or the shards of one output, with its loss mask where it has one.

    Attributes:
        pairs: prefixes of the pair or of the shards.
    """

    def __init__(self, prefix: str):
        self.reader = open_reader(prefix)
        self.mask = find_mask(self.reader)
        self._parts = self.reader.pairs if isinstance(self.reader, Shards) else [self.reader]
        self.pairs = [pair.prefix for pair in self._parts]
        self._open = -1  # number of the pair whose files are open: documents are taken in order
        self._files: list[BinaryIO] = []

    def runs(self, first: int, last: int) -> Iterator[tuple[list[BinaryIO], IndexedReader, int, int]]:
        """Documents [first, last) by pair: its open files (.bin, and its mask's), it, and [first, last) in it."""
        before = 0
        for number, pair in enumerate(self._parts):
            begin, end = max(first - before, 0), min(last - before, pair.n_documents)
            if begin < end:
                yield self._files_of(number), pair, begin, end
            before += pair.n_documents

    def _files_of(self, number: int) -> list[BinaryIO]:
        if number != self._open:
            self.close()
            prefix = self.pairs[number]
            names = [prefix, prefix + loss_mask.SUFFIX] if self.mask else [prefix]
            self._files = [open(name + ".bin", "rb") for name in names]
            self._open = number
        return self._files

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._files, self._open = [], -1

    def __enter__(self) -> "DocumentSource":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class ShardWriter:
    """One pair in the making, under temporary names until `commit`; one sequence a document.

    As a context manager it removes what was not committed.

    Args:
        masked: it has a loss mask, which another writer writes.
    """

    def __init__(self, prefix: str, dtype: np.dtype, masked: bool = False):
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self.mask = ShardWriter(prefix + loss_mask.SUFFIX, loss_mask.DTYPE) if masked else None
        self.documents = self.tokens = 0
        self.committed = False
        os.makedirs(os.path.dirname(os.path.abspath(prefix)), exist_ok=True)
        self.bin = open(prefix + ".bin.partial", "wb")
        self.lengths = open(prefix + ".len.partial", "wb")

    def take(self, source: BinaryIO, start: int, lengths: np.ndarray, mask: BinaryIO | None = None) -> None:
        """Appends documents of `lengths` tokens that are back to back from token `start` of an open .bin and `mask`."""
        if self.mask is not None:
            assert mask is not None
            self.mask.take(mask, start, lengths)
        count = int(lengths.sum(dtype=np.int64))
        if len(lengths) and int(lengths.max()) > MAX_SEQUENCE:
            raise UserError(f"a document of {int(lengths.max())} tokens is longer than the format's {MAX_SEQUENCE}")
        copy_range(source, self.bin, start * self.dtype.itemsize, count * self.dtype.itemsize)
        self.lengths.write(lengths.astype("<i4").tobytes())
        self.documents += len(lengths)
        self.tokens += count

    def take_documents(self, source: DocumentSource, first: int, last: int) -> None:
        """Appends documents [first, last), in pieces."""
        for files, pair, begin, end in source.runs(first, last):
            for at in range(begin, end, CHUNK):
                starts = pair.starts(np.arange(at, min(at + CHUNK, end) + 1))
                self.take(files[0], int(starts[0]), np.diff(starts), *files[1:])

    def close(self) -> None:
        """Everything is written: the pair goes to the disk, still under its temporary names."""
        if self.mask is not None:
            self.mask.close()
        self.lengths.close()
        sync_and_close(self.bin)
        write_index(self.prefix + ".idx.partial", self.dtype, self.prefix + ".len.partial")

    def commit(self) -> None:
        """Names the pair; a manifest or a mask of what was there before no longer describes it.

        The mask gets its name first: killed in between, no tokens are without theirs, or beside another's.
        """
        manifest.forget(self.prefix)
        Path(self.prefix + ".idx").unlink(missing_ok=True)
        if self.mask is not None:
            self.mask.commit()
        else:
            for ending in (".idx", ".bin"):
                Path(self.prefix + loss_mask.SUFFIX + ending).unlink(missing_ok=True)
        commit(self.prefix)
        self.committed = True
        os.unlink(self.prefix + ".len.partial")

    def about(self) -> dict:
        """prefix, documents, tokens, and an empty `loss_mask` where there is one."""
        masked: dict = {} if self.mask is None else {"loss_mask": {}}
        return {"prefix": self.prefix, "documents": self.documents, "tokens": self.tokens, **masked}

    def finish(self) -> dict:
        """Closes and names the pair; returns `about`."""
        self.close()
        self.commit()
        return self.about()

    def drop(self) -> None:
        """Removes what was written."""
        if self.mask is not None:
            self.mask.drop()
        for file in (self.bin, self.lengths):
            with suppress(OSError):  # a full disk refuses what is still in the buffer too
                file.close()
        for ending in (".bin.partial", ".len.partial", ".idx.partial"):
            Path(self.prefix + ending).unlink(missing_ok=True)

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *exception) -> None:
        if not self.committed:
            self.drop()


def copy_range(source: BinaryIO, target: BinaryIO, start: int, count: int) -> None:
    """Appends bytes of one open file to another without bringing them into this process, where the system can."""
    target.flush()
    while count:
        try:
            moved = os.copy_file_range(source.fileno(), target.fileno(), min(count, COPY_AT_ONCE), start)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
                raise
            source.seek(start)
            moved = target.write(source.read(min(count, 1 << 20)))
            target.flush()
        if not moved:
            raise UserError(f"{source.name} is shorter than its index says")
        start += moved
        count -= moved


def refuse_existing(prefix: str, overwrite: bool) -> None:
    """Raises UserError where an output exists already."""
    for path in (prefix, prefix + loss_mask.SUFFIX):
        if not overwrite and any(os.path.exists(path + ending) for ending in (".bin", ".idx")):
            raise UserError(f"{path}.bin or .idx exists; choose another --output, or give --overwrite")
