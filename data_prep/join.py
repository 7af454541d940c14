"""Parts laid end to end into shards, inside the kernel, and the index written from the document lengths."""

import errno
import os
from pathlib import Path

import numpy as np

from data_prep.job import Job
from megatron_taipan.data.indexed import commit, sync_and_close, write_index

COPY_AT_ONCE = 1 << 30


def join_parts(job: Job, output: str, shard_tokens: int | None) -> list[dict]:
    """Writes the shards.

    Args:
        output: prefix; with `shard_tokens` the shards are `output-00000`, `output-00001`, ...
        shard_tokens: a shard is closed before the document that would take it beyond this many tokens.

    Returns:
        of each shard: name, documents, tokens.
    """
    shards = []
    shard = _Shard(job, output if shard_tokens is None else f"{output}-{0:05d}")
    for number in range(len(job.pieces)):
        lengths = np.fromfile(job.part(number) + ".len", "<i4")
        begin = 0
        while shard_tokens is not None and begin < len(lengths):
            fits = int(
                np.searchsorted(np.cumsum(lengths[begin:], dtype=np.int64), shard_tokens - shard.tokens, "right")
            )
            if begin + fits == len(lengths):
                break
            if fits == 0 and not shard.documents:
                fits = 1  # a single document longer than a shard
            shard.take(number, lengths, begin, begin + fits)
            shards.append(shard.finish())
            shard = _Shard(job, f"{output}-{len(shards):05d}")
            begin += fits
        if begin < len(lengths):
            shard.take(number, lengths, begin, len(lengths))
    if shard.documents or not shards:
        shards.append(shard.finish())
    else:
        shard.drop()
    return shards


class _Shard:
    """One .bin/.idx pair in the making, under temporary names."""

    def __init__(self, job: Job, prefix: str):
        self.job, self.prefix = job, prefix
        self.documents = self.tokens = 0
        self.bin = open(prefix + ".bin.partial", "wb")
        self.lengths = open(prefix + ".len.partial", "wb")

    def take(self, number: int, lengths: np.ndarray, begin: int, end: int) -> None:
        """Appends documents [begin, end) of a part."""
        size = self.job.dtype.itemsize
        start, count = int(lengths[:begin].sum(dtype=np.int64)), int(lengths[begin:end].sum(dtype=np.int64))
        with open(self.job.part(number) + ".bin", "rb") as part:
            copy_range(part, self.bin, start * size, count * size)
        self.lengths.write(lengths[begin:end].tobytes())
        self.documents += end - begin
        self.tokens += count

    def finish(self) -> dict:
        self.lengths.close()
        sync_and_close(self.bin)
        write_index(self.prefix + ".idx.partial", self.job.dtype, self.prefix + ".len.partial")
        commit(self.prefix)
        os.unlink(self.prefix + ".len.partial")
        return {"prefix": self.prefix, "documents": self.documents, "tokens": self.tokens}

    def drop(self) -> None:
        self.bin.close()
        self.lengths.close()
        for ending in (".bin.partial", ".len.partial"):
            Path(self.prefix + ending).unlink()


def copy_range(source, target, start: int, count: int) -> None:
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
            raise OSError(errno.EIO, "a part is shorter than its lengths say", source.name)
        start += moved
        count -= moved
