"""Counters that worker processes add to, and the line that shows them."""

import mmap
import struct
import sys
import time

ROW = struct.Struct("qqq")


class ProgressLine:
    """Text bytes, tokens and documents done, one row of counters a process, in memory shared through fork."""

    def __init__(self, total_bytes: int, rows: int, stream=None):
        self.memory = mmap.mmap(-1, ROW.size * rows)
        self.rows, self.total = rows, total_bytes
        self.stream = stream or sys.stderr
        self.start = self.shown = time.monotonic()
        self.finished_input = 0  # bytes of input, by which the share done is shown
        self.live = self.stream.isatty()

    def adder(self, row: int):
        """A function that adds to one row; each process uses its own row."""

        def add(bytes: int, tokens: int, documents: int) -> None:
            old = ROW.unpack_from(self.memory, row * ROW.size)
            ROW.pack_into(self.memory, row * ROW.size, old[0] + bytes, old[1] + tokens, old[2] + documents)

        return add

    def sums(self) -> tuple[int, int, int]:
        rows = [ROW.unpack_from(self.memory, row * ROW.size) for row in range(self.rows)]
        size, tokens, documents = map(sum, zip(*rows, strict=True))
        return size, tokens, documents

    def show(self) -> None:
        """Draws the line (on a terminal), or prints one every 30 seconds."""
        now = time.monotonic()
        if now - self.shown < (0.5 if self.live else 30):
            return
        self.shown = now
        print(self.line(), end="\r" if self.live else "\n", file=self.stream, flush=True)

    def line(self) -> str:
        elapsed = max(time.monotonic() - self.start, 1e-6)
        size, tokens, documents = self.sums()
        share = min(self.finished_input / self.total, 1) if self.total else 1
        left = f"{elapsed / share - elapsed:.0f} s left" if share > 0 else "time left unknown"
        return (
            f"{100 * share:5.1f} %  {size / elapsed / 1e6:.1f} MB/s  {tokens / elapsed / 1e6:.2f} M tokens/s "
            f" {documents} documents  {left}   "
        )

    def clear(self) -> None:
        if self.live:
            print(" " * 100, end="\r", file=self.stream, flush=True)
