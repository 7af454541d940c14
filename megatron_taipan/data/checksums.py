"""Compares every byte of the data with the checksums of its manifests before a run (data.verify).

Opening a pair reads its whole index and 16 blocks of 4 kB of its .bin, which is what the fingerprint covers; a token
that changes elsewhere is not seen. The manifest of `data_prep tokenize` holds the xxh3-128 of every file.
"""

import os
import time
from collections.abc import Iterator

import xxhash

from megatron_taipan.data.loss_mask import SUFFIX
from megatron_taipan.data.manifests import shard_entry
from megatron_taipan.data.share import share
from megatron_taipan.data.sources import find_pairs
from megatron_taipan.data_config import DataConfig
from megatron_taipan.errors import UserError

BLOCK = 1 << 20
BYTES_PER_TURN = 4 << 30  # bytes read between two calls of `Verification.go_on`'s caller


class Verification:
    """Compares the files of all sources with their manifests, spread over the processes of a run.

    Attributes:
        files: how many there are, of all processes.
        size: bytes of all of them.
        unfinished: whether this process has something left to read.

    Raises:
        UserError: a pair has no manifest with checksums.
    """

    def __init__(self, data: DataConfig, process: int = 0, processes: int = 1):
        wanted = dict(_wanted(data))
        self.files, self.size = len(wanted), sum(map(os.path.getsize, wanted))
        mine = share([(os.path.getsize(path), path) for path in wanted], processes, process)
        self.began = time.perf_counter()
        self._reading = _read([(path, *wanted[path]) for path in mine])
        self.unfinished = bool(mine)

    def go_on(self) -> None:
        """Reads 4 GiB more.

        Raises:
            UserError: a file is not what its manifest says.
        """
        self.unfinished = next(self._reading, None) is not None

    def report(self) -> str:
        """What was checked, once everything is read."""
        return (
            f"every byte of {self.files} files, {self.size / 1e9:.2f} GB, is as their manifests say; checked in"
            f" {time.perf_counter() - self.began:.1f} s (data.verify)"
        )


def _wanted(data: DataConfig) -> Iterator[tuple[str, tuple[str, str]]]:
    """For every file of the data that is used: its path, its checksum and the manifest that holds the checksum."""
    for source in [*data.train, *(data.valid or [])]:
        for prefix in find_pairs(source.prefix):
            manifest, said = shard_entry(prefix)
            pairs = [(prefix, said)]
            if source.loss_mask != "ignore" and os.path.exists(prefix + SUFFIX + ".idx"):
                pairs.append((prefix + SUFFIX, said.get("loss_mask", {})))
            for pair, sums in pairs:
                for ending in ("bin", "idx"):
                    if f"{ending}_xxh3_128" not in sums:
                        raise UserError(
                            f"data.verify=true and {pair}.{ending} has no checksum: only what `data_prep tokenize` made"
                            f" has, in its manifest ({manifest}); set data.verify=false, or name the tokenized shards"
                            " themselves"
                        )
                    yield f"{pair}.{ending}", (sums[f"{ending}_xxh3_128"], manifest)


def _read(files: list[tuple[str, str, str]]) -> Iterator[str]:
    """Hashes (path, checksum, manifest); yields the current path whenever BYTES_PER_TURN bytes were read."""
    left = BYTES_PER_TURN
    for path, wanted, manifest in files:
        digest = xxhash.xxh3_128()
        try:
            with open(path, "rb", buffering=0) as file:
                while block := file.read(BLOCK):
                    digest.update(block)
                    left -= len(block)
                    if left <= 0:
                        left = BYTES_PER_TURN
                        yield path
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        if digest.hexdigest() != wanted:
            raise UserError(
                f"{path} has checksum {digest.hexdigest()} and {manifest} says {wanted}: bytes of it changed since it"
                " was made; copy it here again, or tokenize again"
            )
