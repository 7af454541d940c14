"""xxh3-128 hashes: checksums against damage, not against forgery."""

import os
from typing import Any

import xxhash

READ_BYTES = 1 << 20  # read at a time


def hash_file(path: str) -> str:
    """Of a whole file, which must be there."""
    return hash_slice(path, 0, os.path.getsize(path))


def hash_slice(path: str, start: int, stop: int) -> str:
    """Of bytes [start, stop) of a file; of one that cannot be read, the empty string."""
    digest = xxhash.xxh3_128()
    try:
        with open(path, "rb", buffering=0) as file:
            hash_into(digest, file, start, stop)
    except OSError:
        return ""
    return digest.hexdigest()


def hash_into(digest: Any, file: Any, start: int, stop: int) -> None:
    """Takes bytes [start, stop) of an open file into a digest."""
    file.seek(start)
    while start < stop and (block := file.read(min(READ_BYTES, stop - start))):
        digest.update(block)
        start += len(block)


class HashedFile:
    """A new file that is hashed while it is written, so it is not read again for that."""

    def __init__(self, path: str):
        self.file = open(path, "wb")
        self.digest = xxhash.xxh3_128()

    def write(self, data: Any) -> None:
        """Appends bytes or any other buffer."""
        self.file.write(data)
        self.digest.update(data)

    def mark(self) -> tuple[int, Any]:
        """This place in the file, for `go_back`."""
        return self.file.tell(), self.digest.copy()

    def go_back(self, mark: tuple[int, Any]) -> None:
        """Takes back what was written since the mark."""
        self.file.seek(mark[0])
        self.file.truncate()
        self.digest = mark[1]

    def close(self) -> str:
        """The file is complete; returns its hash."""
        self.file.close()
        return self.digest.hexdigest()
