"""The content of compressed files: gzip, zstandard, bzip2, xz.

A file is a row of members (streams, frames), each whole in itself. Nothing that was unpacked is lost to what follows
it: what follows the last member and begins none is reported as `garbage`, after the content has ended.

Whatever a file holds, no more than a few MB of it are in memory, besides the window that it asks for.
"""

import bz2
import io
import lzma
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from data_prep.limits import DEFAULT_LIMITS
from data_prep.packages import require

try:
    from isal import isal_zlib as zlib  # unpacks three times faster
except ImportError:
    import zlib  # type: ignore[no-redef]

PACKED_READ_BYTES = 1 << 16  # of a packed file, unpacked at a time
BUFFER_BYTES = 1 << 20

# what a member begins with; zstandard has frames to be passed over too
GZIP, BZIP2, XZ = (b"\x1f\x8b",), (b"BZh",), (b"\xfd7zXZ\x00",)
ZSTANDARD = (b"\x28\xb5\x2f\xfd", *(bytes([low]) + b"\x2a\x4d\x18" for low in range(0x50, 0x60)))

RLE, RESERVED = 1, 3  # kinds of blocks of zstandard: one byte many times, and none
LARGEST_BLOCK_BYTES = 128 << 10  # bytes of a block of zstandard, packed or not
BLOCKS_AT_ONCE = 16  # of zstandard, unpacked at a time
XZ_OVERHEAD_BYTES = 16 << 20  # bytes that xz takes besides its dictionary, at most


@dataclass(frozen=True)
class Form:
    """A form of compression.

    Attributes:
        magic: what a member begins with.
        unpacker: of the largest window in bytes; what unpacks one member, an object like bz2.BZ2Decompressor.
        needs: package that it takes.
    """

    magic: tuple[bytes, ...]
    unpacker: Callable[[int], Any]
    needs: str = ""


class Damaged(Exception):
    """Compressed data is not what it should be; the message says why."""


class TooWide(Exception):
    """Compressed data takes more memory than it may; the message says so."""


def open_packed(path: str, window: int = DEFAULT_LIMITS.window) -> io.BufferedReader:
    """The content of a file whose name has one of the endings of FORMS. Reading raises EOFError where the file
    ends within a member or has none, Damaged, and TooWide where unpacking takes a window of more bytes."""
    return io.BufferedReader(Unpacked(path, window), BUFFER_BYTES)


def is_packed(path: str) -> bool:
    """Whether the name of a file says that it is compressed."""
    return os.path.splitext(path.lower())[1] in FORMS


def garbage(file: Any) -> str:
    """What follows the content of an open file that has been read to its end; empty where nothing did."""
    return getattr(getattr(file, "raw", None), "garbage", "")


class Unpacked(io.RawIOBase):
    """The members of a file, one after the other.

    Attributes:
        garbage: what follows the last member, in words; empty where nothing does, or zeros only, with which
            tapes are filled.
    """

    def __init__(self, path: str, window: int = DEFAULT_LIMITS.window):
        form = FORMS[os.path.splitext(path.lower())[1]]
        if form.needs:
            require(form.needs, f"{path}: reading it")
        self.magic, self.new = form.magic, lambda: form.unpacker(window)
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
                self.left = self.file.read(PACKED_READ_BYTES)
            data, self.left = self.left, b""
            try:
                out = self.member.decompress(data, len(buffer))
            except (TooWide, MemoryError):
                raise
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
        while len(self.left) < longest and (data := self.file.read(PACKED_READ_BYTES)):
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


def _too_wide(what: str, window: int) -> TooWide:
    return TooWide(f"{what} takes more memory than the {window >> 20} MB of --max-window-mb; give more if you trust it")


class _Inner:
    """What unpacks one member, around the library's own."""

    inner: Any

    @property
    def eof(self) -> bool:
        return self.inner.eof

    @property
    def unused_data(self) -> bytes:
        return self.inner.unused_data


class _Gzip(_Inner):
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


class _Xz(_Inner):
    """One stream of xz."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.inner = lzma.LZMADecompressor(lzma.FORMAT_XZ, window + XZ_OVERHEAD_BYTES)

    def decompress(self, data: bytes, limit: int) -> bytes:
        try:
            return self.inner.decompress(data, limit)
        except lzma.LZMAError as error:
            if "limit exceeded" in str(error):
                raise _too_wide("the dictionary of this xz stream", self.window) from error
            raise

    @property
    def needs_input(self) -> bool:
        return self.inner.needs_input


class _Zstandard:
    """One frame of zstandard (RFC 8878), given to the library a few blocks at a time.

    The library unpacks all that it is given, and 64 kB can hold 2 GB. But a frame is a row of blocks, each with its
    packed size before it, which hold at most 128 kB each.
    """

    def __init__(self, window: int) -> None:
        import zstandard as library  # not installed on every machine

        self.library, self.window = library, window
        self.inner = library.ZstdDecompressor(max_window_size=window).decompressobj()
        self.raw = bytearray()  # what the library was not given yet
        self.out = memoryview(b"")  # what it gave and was not read yet
        self.begun = False  # whether the library was given the header
        self.to_skip = 0  # bytes left of a frame that is to be passed over
        self.checksum = 0  # bytes after the last block

    def decompress(self, data: bytes, limit: int) -> memoryview:
        self.raw += data
        if not self.out and (count := self._whole()):
            self.begun, self.to_skip = True, max(0, self.to_skip - count)
            self.out = memoryview(self.inner.decompress(bytes(memoryview(self.raw)[:count])))
            del self.raw[:count]
        out, self.out = self.out[:limit], self.out[limit:]
        return out

    def _whole(self) -> int:
        """Bytes of `raw` that the library may be given: the header, and some blocks that are all there."""
        at = 0
        if not self.begun and not (at := self._read_header()):
            return 0
        if self.to_skip:
            return min(self.to_skip, len(self.raw))
        for _ in range(BLOCKS_AT_ONCE):
            if len(self.raw) < at + 3:
                break
            head = int.from_bytes(self.raw[at : at + 3], "little")
            last, kind, size = head & 1, head >> 1 & 3, head >> 3
            stop = at + 3 + (1 if kind == RLE else size) + last * self.checksum
            if kind == RESERVED or size > LARGEST_BLOCK_BYTES:
                return len(self.raw)  # the library says what is wrong
            if stop > len(self.raw):
                break
            at = stop
            if last:
                break
        return at

    def _read_header(self) -> int:
        """Bytes of the header, 0 where it is not all there.

        Raises:
            TooWide: the window is.
        """
        if len(self.raw) < 8:  # no frame is shorter
            return 0
        if not self.raw.startswith(ZSTANDARD[0]):
            self.to_skip = self.to_skip or 8 + int.from_bytes(self.raw[4:8], "little")
            return 8
        size = self.library.frame_header_size(bytes(self.raw[:18]))
        if len(self.raw) < size:
            return 0
        about = self.library.get_frame_parameters(bytes(self.raw[:size]))
        if about.window_size > self.window:
            raise _too_wide(f"the window of {about.window_size:,} bytes of this zstandard frame", self.window)
        self.checksum = 4 * about.has_checksum
        return size

    @property
    def needs_input(self) -> bool:
        return not self.out and not self._whole()

    @property
    def eof(self) -> bool:
        return self.inner.eof and not self.out

    @property
    def unused_data(self) -> bytes:
        return self.inner.unused_data + bytes(self.raw)


ZSTANDARD_FORM = Form(ZSTANDARD, _Zstandard, needs="zstandard")
FORMS = {  # by the ending of a file's name
    ".gz": Form(GZIP, lambda window: _Gzip()),
    ".zst": ZSTANDARD_FORM,
    ".zstd": ZSTANDARD_FORM,
    ".bz2": Form(BZIP2, lambda window: bz2.BZ2Decompressor()),
    ".xz": Form(XZ, _Xz),
}
