"""The content of compressed files: gzip, zstandard, bzip2, xz.

A file is a row of members (streams, frames), each whole in itself. Nothing that was unpacked is lost to what follows
it: what stands behind the last member and begins none is told as `garbage`, after the content has ended.
"""

import bz2
import io
import lzma
import os
from collections.abc import Callable
from typing import Any, cast

from megatron_taipan.errors import UserError

try:
    from isal import isal_zlib as zlib  # unpacks three times faster
except ImportError:
    import zlib  # type: ignore[no-redef]

BLOCK = 1 << 16  # bytes of a file unpacked at a time
BUFFER = 1 << 20

# what a member begins with; zstandard has frames to be passed over too
GZIP, BZIP2, XZ = (b"\x1f\x8b",), (b"BZh",), (b"\xfd7zXZ\x00",)
ZSTANDARD = (b"\x28\xb5\x2f\xfd", *(bytes([low]) + b"\x2a\x4d\x18" for low in range(0x50, 0x60)))


class Damaged(Exception):
    """Compressed data is not what it should be; the message says why."""


def open_packed(path: str) -> io.BufferedReader:
    """The content of a file whose name ends in .gz, .zst, .zstd, .bz2 or .xz. Reading raises EOFError where the file
    ends within a member or has none, and Damaged."""
    return io.BufferedReader(Unpacked(path), BUFFER)


def garbage(file: Any) -> str:
    """What stood behind the content of an open file that has been read to its end; empty where nothing did."""
    return getattr(getattr(file, "raw", None), "garbage", "")


class Unpacked(io.RawIOBase):
    """The members of a file, one behind the other.

    Attributes:
        garbage: what stands behind the last member, in words; empty where nothing does, or zeros only, with which
            tapes are filled.
    """

    def __init__(self, path: str):
        self.magic, self.new = _form(path)
        self.file = open(path, "rb", buffering=0)
        self.left = b""  # read, and not yet given to a member
        self.member: Any = None
        self.members = 0
        self.garbage = ""

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.file.close()
        super().close()

    def readinto(self, buffer: Any) -> int:
        while self.member or self._begin():
            read = not self.left and self.member.needs_input
            if read:
                self.left = self.file.read(BLOCK)
            data, self.left = self.left, b""
            try:
                out = self.member.decompress(data, len(buffer))
            except Exception as error:  # every library has its own, and bz2 raises a plain OSError
                raise Damaged(" ".join(str(error).split())) from error
            if self.member.eof:
                self.left, self.member = self.member.unused_data, None
            if out:
                buffer[: len(out)] = out
                return len(out)
            if read and not data and self.member:
                raise EOFError
        return 0

    def _begin(self) -> bool:
        """Whether another member follows; it is made."""
        longest = max(map(len, self.magic))
        while len(self.left) < longest and (data := self.file.read(BLOCK)):
            self.left += data
            if self.members:
                self.left = self.left.lstrip(b"\0")
        if self.members:
            self.left = self.left.lstrip(b"\0")
            if not self.left:
                return False
        if not self.left.startswith(self.magic):
            if any(magic.startswith(self.left) for magic in self.magic):
                raise EOFError
            if not self.members:
                raise Damaged(f"the file begins with {self.left[:8]!r}")
            size = len(self.left) + os.fstat(self.file.fileno()).st_size - self.file.tell()
            self.garbage = f"{size} bytes, which begin with {self.left[:8]!r}"
            self.file.seek(0, os.SEEK_END)
            self.left = b""
            return False
        self.member = self.new()
        self.members += 1
        return True


def _form(path: str) -> tuple[tuple[bytes, ...], Callable[[], Any]]:
    """What a member begins with, and what unpacks one: an object like bz2.BZ2Decompressor."""
    ending = os.path.splitext(path.lower())[1]
    if ending == ".gz":
        return GZIP, _Gzip
    if ending == ".bz2":
        return BZIP2, bz2.BZ2Decompressor
    if ending == ".xz":
        return XZ, lzma.LZMADecompressor
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{path}: reading {ending} takes the package zstandard; `pip install zstandard`") from error
    window = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    return ZSTANDARD, lambda: _Zstandard(window.decompressobj())


class _Gzip:
    """One member of gzip."""

    def __init__(self) -> None:
        self.inner = cast(Any, zlib).decompressobj(wbits=31)
        self.tail = b""

    def decompress(self, data: bytes, limit: int) -> bytes:
        out = self.inner.decompress(self.tail + data, limit)
        self.tail = self.inner.unconsumed_tail
        return out

    @property
    def needs_input(self) -> bool:
        return not self.tail

    @property
    def eof(self) -> bool:
        return self.inner.eof

    @property
    def unused_data(self) -> bytes:
        return self.inner.unused_data


class _Zstandard:
    """One frame of zstandard. The library gives all that a block holds; it is kept here until it is asked for."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.out = b""

    def decompress(self, data: bytes, limit: int) -> bytes:
        if data:
            self.out += self.inner.decompress(data)
        out, self.out = self.out[:limit], self.out[limit:]
        return out

    @property
    def needs_input(self) -> bool:
        return not self.out

    @property
    def eof(self) -> bool:
        return self.inner.eof and not self.out

    @property
    def unused_data(self) -> bytes:
        return self.inner.unused_data
