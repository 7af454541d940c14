"""Writing a .bin/.idx pair out of ranges of other .bin files; the bytes move inside the kernel."""

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep import manifest
from megatron_taipan.data.indexed import CHUNK, MAX_SEQUENCE, IndexedReader, commit, sync_and_close, write_index
from megatron_taipan.errors import UserError

COPY_AT_ONCE = 1 << 30


class ShardWriter:
    """One pair in the making, under temporary names until `commit`; one sequence a document.

    As a context manager it removes what was not committed.
    """

    def __init__(self, prefix: str, dtype: np.dtype):
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self.documents = self.tokens = 0
        self.committed = False
        os.makedirs(os.path.dirname(os.path.abspath(prefix)), exist_ok=True)
        self.bin = open(prefix + ".bin.partial", "wb")
        self.lengths = open(prefix + ".len.partial", "wb")

    def take(self, source: BinaryIO, start: int, lengths: np.ndarray) -> None:
        """Appends documents of `lengths` tokens that lie back to back from token `start` of an open .bin."""
        count = int(lengths.sum(dtype=np.int64))
        if len(lengths) and int(lengths.max()) > MAX_SEQUENCE:
            raise UserError(f"a document of {int(lengths.max())} tokens is longer than the format's {MAX_SEQUENCE}")
        copy_range(source, self.bin, start * self.dtype.itemsize, count * self.dtype.itemsize)
        self.lengths.write(lengths.astype("<i4").tobytes())
        self.documents += len(lengths)
        self.tokens += count

    def take_documents(self, reader: IndexedReader, source: BinaryIO, first: int, last: int) -> None:
        """Appends documents [first, last) of an indexed file, in pieces."""
        for at in range(first, last, CHUNK):
            starts = reader.starts(np.arange(at, min(at + CHUNK, last) + 1))
            self.take(source, int(starts[0]), np.diff(starts))

    def close(self) -> None:
        """Everything is written: the pair goes to the disk, still under its temporary names."""
        self.lengths.close()
        sync_and_close(self.bin)
        write_index(self.prefix + ".idx.partial", self.dtype, self.prefix + ".len.partial")

    def commit(self) -> None:
        """Names the pair; a manifest of what stood there describes it no longer."""
        manifest.forget(self.prefix)
        commit(self.prefix)
        self.committed = True
        os.unlink(self.prefix + ".len.partial")

    def about(self) -> dict:
        """prefix, documents, tokens."""
        return {"prefix": self.prefix, "documents": self.documents, "tokens": self.tokens}

    def finish(self) -> dict:
        """Closes and names the pair; returns `about`."""
        self.close()
        self.commit()
        return self.about()

    def drop(self) -> None:
        """Removes what was written."""
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
    """Raises UserError where an output stands already."""
    if not overwrite and any(os.path.exists(prefix + ending) for ending in (".bin", ".idx")):
        raise UserError(f"{prefix}.bin or .idx exists; choose another --output, or give --overwrite")
