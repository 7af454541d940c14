"""Text of any length in bounded memory: as chunks from a file, or from one line of JSON that is too long to parse.

A line of JSON is read in blocks. Its long strings are decoded into a file without a name and replaced by short marks in
what is left of the line; that skeleton is parsed as usual, and in the text that it gives the marks are replaced by what
they replace.
"""

import codecs
import re
import secrets
import tempfile
from collections.abc import Iterator
from typing import IO

from data_prep import tolerant
from data_prep.limits import DEFAULT_LIMITS, too_large
from megatron_taipan.errors import UserError

READ_BYTES = 1 << 20  # read at a time
LONG_STRING = 1 << 20  # bytes of a JSON string that goes to a file
LONGEST_SKELETON = 64 << 20  # bytes of a line besides its long strings
ESCAPE = 12  # bytes of the longest escape: \\ud83d\\ude00


class BrokenText(ValueError):
    """A text turned out not to be one while it was read; the message says why."""


def decoded(blocks: Iterator[bytes], encoding: str = "utf-8") -> Iterator[str]:
    """UTF-8 in blocks as text.

    Raises:
        BrokenText: a byte is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    done = 0
    for block in blocks:
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block)
        except UnicodeDecodeError as error:
            raise BrokenText(f"invalid UTF-8 at byte {done - pending + error.start}") from error
        done += len(block)
        yield text
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise BrokenText(f"invalid UTF-8 at byte {done - len(error.object) + error.start}") from error


def blocks_of(first: bytes, file) -> Iterator[bytes]:
    """`first`, then the rest of a file."""
    while first:
        yield first
        first = file.read(READ_BYTES)


class LongLine:
    """One line of JSON, read to its end.

    Args:
        limit: bytes of a line from which on nothing of it is kept.

    Attributes:
        size: bytes of the line.
        skeleton: the line with marks in place of long strings, or None where it cannot be JSON.
        problem: why it cannot.

    Raises:
        UserError: there is no room for its long strings.
    """

    def __init__(self, first: bytes, file, scratch: str | None, limit: int = DEFAULT_LIMITS.record):
        self.scratch = scratch
        self.spool: IO[bytes] | None = None
        self.mark = f"<long string {secrets.token_hex(16)} "
        self.places: list[tuple[int, int]] = []  # (start, stop) in the spool of each mark
        self.faults: dict[int, str] = {}  # why the string of a mark is not a text
        self.decoded = 0  # characters of the string that goes to the spool
        self.out = bytearray()  # the skeleton so far
        self.held = bytearray()  # of the string being read, what is not decoded yet; starts at the border of an escape
        self.inside = self.spooling = False
        self.problem, self.size = "", 0
        block = first
        while block:
            self.size += len(block)
            if self.size > limit and not self.problem:
                self.problem = too_large(limit)
            if not self.problem:
                self._feed(block)
            if self.problem:
                self._drop()
            if block.endswith(b"\n"):
                break
            block = file.readline(READ_BYTES)
        if self.inside and not self.problem:
            self.problem = "broken JSON: the line ends inside a string"
        self.skeleton = None if self.problem else bytes(self.out)

    def _drop(self) -> None:
        """Gives back what was kept of a line that gives nothing."""
        if self.spool is not None:
            self.spool.close()
        self.spool = None
        self.out.clear()
        self.held.clear()

    def _feed(self, block: bytes) -> None:
        at = 0
        while at < len(block) and not self.problem:
            if self.inside:
                at = self._string(block, at)
                continue
            quote = block.find(b'"', at)
            stop = len(block) if quote < 0 else quote
            self.out += b" ".join(re.split(rb"[ \t\r\n]+", block[at:stop]))
            at = stop + 1
            if quote >= 0:
                self.inside = True
            if len(self.out) > LONGEST_SKELETON:
                self.problem = f"record too large: over {LONGEST_SKELETON} bytes besides its long strings"

    def _string(self, block: bytes, at: int) -> int:
        """Reads string content from `at` on; returns where it stopped: after the quote, or at the end."""
        known = len(self.held)
        begin = known - backslashes(self.held)  # a quote may follow backslashes of an earlier block
        self.held += memoryview(block)[at:]
        # escapes of the same length without quotes: what is left is the end
        quote = self.held[begin:].replace(b"\\\\", b"__").replace(b'\\"', b"__").find(b'"')
        if quote < 0:
            if self.spooling or len(self.held) > LONG_STRING:
                self._decode(complete_length(self.held))
            return len(block)
        quote += begin
        at += quote - known + 1
        del self.held[quote:]
        self.inside = False
        if self.spooling or len(self.held) > LONG_STRING:
            self._decode(len(self.held))
            self.out += b'"' + f"{self.mark}{len(self.places) - 1}>".encode() + b'"'
        else:
            self.out += b'"' + self.held + b'"'
        self.held.clear()
        self.spooling = False
        return at

    def _decode(self, count: int) -> None:
        """Decodes the first `count` bytes of the content read so far into the spool."""
        begin = not self.spooling
        raw = bytes(self.held[:count])
        string, text = "", b""
        try:
            string = tolerant.loads(b'"' + raw + b'"')
            text = string.encode()
        except UnicodeEncodeError as error:  # a fault of this string only
            self.faults.setdefault(
                len(self.places) - (not begin), tolerant.no_text(error, 0 if begin else self.decoded)
            )
        except ValueError as error:
            self.problem = f"broken JSON: {error}"
        self.decoded = len(string) + (0 if begin else self.decoded)
        try:
            if self.spool is None:
                self.spool = tempfile.TemporaryFile(dir=self.scratch)
            if begin:
                self.places.append((self.spool.tell(), self.spool.tell()))
                self.spooling = True
            self.spool.write(text)
            self.spool.flush()
        except OSError as error:  # of our disk, and no fault of the input that could be left out
            raise UserError(
                f"no room for a long document in {self.scratch or tempfile.gettempdir()}: {error.strerror}; free some"
                " space and run the same command again"
            ) from error
        self.places[-1] = (self.places[-1][0], self.spool.tell())
        del self.held[:count]

    def chunks(self, text: str) -> Iterator[str]:
        """`text` with the marks in it replaced by the strings that they replace; in pieces."""
        assert self.spool is not None
        for number, part in enumerate(re.split(re.escape(self.mark) + r"(\d+)>", text)):
            if number % 2:
                yield from decoded(_slice(self.spool, *self.places[int(part)]))
            elif part:
                yield part

    def marked(self, text: str) -> bool:
        """Whether a mark is in `text`."""
        return self.mark in text

    def fault(self, text: str) -> str:
        """Why one of the long strings in `text` is not a text; empty where all are."""
        found = map(int, re.findall(re.escape(self.mark) + r"(\d+)>", text))
        return next((self.faults[number] for number in found if number in self.faults), "")


def backslashes(raw: bytearray) -> int:
    """How many backslashes are at the end."""
    looked_at = 8
    while True:
        tail = raw[-looked_at:]
        run = len(tail) - len(tail.rstrip(b"\\"))
        if run < looked_at:
            return run
        looked_at *= 8


def complete_length(raw: bytearray) -> int:
    """How much of a string's raw content ends neither within an escape, nor within a pair of surrogate escapes, nor
    within a character of UTF-8. `raw` starts at such a border."""
    start = len(raw[: max(0, len(raw) - ESCAPE - 6)].rstrip(b"\\"))  # not preceded by a backslash, or the beginning
    at = start
    while at < len(raw):
        step = 1
        if raw[at] == 0x5C:
            unicode = raw[at + 1 : at + 2] == b"u"
            high = unicode and raw[at + 2 : at + 3] in (b"d", b"D") and raw[at + 3 : at + 4] in b"89abAB"
            step = 12 if high and raw[at + 6 : at + 8] == b"\\u"[: len(raw[at + 6 : at + 8])] else 6 if unicode else 2
        if at + step > len(raw):
            return at
        at += step
    for back in range(1, min(4, len(raw) + 1)):
        byte = raw[-back]
        if byte < 0x80:
            break
        if byte >= 0xC0:
            return at if back >= 2 + (byte >= 0xE0) + (byte >= 0xF0) else at - back
    return at


def _slice(file: IO[bytes], start: int, stop: int) -> Iterator[bytes]:
    while start < stop:
        file.seek(start)
        block = file.read(min(READ_BYTES, stop - start))
        start += len(block)
        yield block
