"""Parts laid end to end into shards, with their loss masks, while later parts are still made."""

import os
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import xxhash

from data_prep.hashing import hash_into
from data_prep.job import Job
from data_prep.shards import ShardWriter

SYNCED = 32 << 20  # bytes that are sent to the disk together, so that little is left to wait for at the end


class Joiner:
    """Appends each part to the shards as soon as it and all before it are finished, in a separate thread.

    The shards have temporary names until `commit`; without it, they are removed when the joiner is left.

    Args:
        output: prefix; with `shard_tokens` the shards are `output-00000`, `output-00001`, ...
        shard_tokens: a shard is closed before the document that would take it beyond this many tokens.
    """

    def __init__(self, job: Job, output: str, shard_tokens: int | None):
        self.job, self.output, self.shard_tokens = job, output, shard_tokens
        self.finished: set[int] = set()  # parts that wait for an earlier one
        self.next = 0
        self.writers: list[ShardWriter] = []
        self.digests: list[xxhash.xxh3_128] = []  # of each shard's .bin
        self.mask_digests: list[xxhash.xxh3_128] = []  # of its mask's
        self._open()
        self.unsynced = 0
        self.committed = False
        self.thread = ThreadPoolExecutor(1)
        self.appended: list[Future] = []

    def __enter__(self) -> "Joiner":
        return self

    def __exit__(self, *exception) -> None:
        self.thread.shutdown(cancel_futures=True)
        if not self.committed:
            for writer in self.writers:
                writer.drop()

    def add(self, number: int) -> None:
        """A part is finished.

        Raises:
            OSError, UserError: what stopped the thread.
        """
        self.finished.add(number)
        while self.next in self.finished:
            self.finished.remove(self.next)
            self.appended.append(self.thread.submit(self._append, self.next))
            self.next += 1
        while self.appended and self.appended[0].done():
            self.appended.pop(0).result()

    def finish(self) -> list[dict]:
        """All parts were added; waits until their shards are on the disk.

        Returns:
            of each shard: prefix, documents, tokens, checksum of the .bin, and of its mask's in `loss_mask`.
        """
        if self.next < len(self.job.units):
            raise RuntimeError(f"part {self.next} of {len(self.job.units)} was not added")
        for appended in self.appended:
            appended.result()
        self.writers[-1].close()
        shards = [writer.about() for writer in self.writers]
        for number, shard in enumerate(shards):
            shard["bin_xxh3_128"] = self.digests[number].hexdigest()
            if self.job.marked:
                shard["loss_mask"] = {"bin_xxh3_128": self.mask_digests[number].hexdigest()}
        return shards

    def commit(self) -> None:
        """Gives the shards their names."""
        for writer in self.writers:
            writer.commit()
        self.committed = True

    def _open(self) -> None:
        prefix = self.output if self.shard_tokens is None else f"{self.output}-{len(self.writers):05d}"
        self.writers.append(ShardWriter(prefix, self.job.dtype, self.job.marked))
        self.digests.append(xxhash.xxh3_128())
        self.mask_digests.append(xxhash.xxh3_128())

    def _append(self, number: int) -> None:
        lengths = np.fromfile(self.job.part(number) + ".len", "<i4")
        ends = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        begin, width = 0, self.job.dtype.itemsize
        with ExitStack() as stack:
            part = stack.enter_context(open(self.job.part(number) + ".bin", "rb", buffering=0))
            mask = None
            if self.job.marked:
                mask = stack.enter_context(open(self.job.part(number) + ".mask", "rb", buffering=0))
            while begin < len(lengths):
                shard, end = self.writers[-1], len(lengths)
                if self.shard_tokens is not None:
                    room = self.shard_tokens - shard.tokens + int(ends[begin])
                    end = max(begin, int(np.searchsorted(ends, room, "right")) - 1)
                    if end == begin and not shard.documents:
                        end = begin + 1  # a single document longer than a shard
                shard.take(part, int(ends[begin]), lengths[begin:end], mask)
                hash_into(self.digests[-1], part, int(ends[begin]) * width, int(ends[end]) * width)
                if mask is not None:
                    hash_into(self.mask_digests[-1], mask, int(ends[begin]), int(ends[end]))
                begin = end
                if begin < len(lengths):
                    shard.close()
                    self._open()
        self.unsynced += int(ends[-1]) * width
        if self.unsynced >= SYNCED:
            os.fdatasync(self.writers[-1].bin.fileno())
            self.unsynced = 0
