"""How command line programs end: a line for what is wrong, and a status.

Their standard streams are taken as shells and clusters leave them: closed, a pipe that nobody reads, a file on a full
disk, Latin-1.
"""

import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import wraps
from typing import Any

from megatron_taipan.errors import UserError


def exits_cleanly(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wraps a program's `main`: a UserError becomes `error: ...` on stderr and its exit status; the rest is
    `with_streams`'s."""

    @wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            return with_streams(lambda: main(*args, **kwargs) or 0)
        except UserError as error:
            say_at_end(f"error: {error}")
            return error.exit_status

    return run


def say_at_end(text: str) -> None:
    """The last line on stderr; where it cannot be written, as on a full disk, the exit status alone tells."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        _silence(sys.stderr)


def with_streams(program: Callable[[], int]) -> int:
    """Runs a program, whatever its standard streams are, and gives its exit status.

    A character that the locale's encoding lacks is printed as an escape. A reader that has enough, as `head`, ends the
    program without a word, with the status that SIGPIPE gives (141).

    Raises:
        UserError: what was printed cannot be written, as to a file on a full disk.
    """
    open_streams()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does
    out: Any = sys.stdout if isinstance(sys.stdout, _Output) else _Output(sys.stdout)
    try:
        with redirect_stdout(out):
            return _flushed(program)
    except _NoReader:
        return 128 + signal.SIGPIPE


def _flushed(program: Callable[[], int]) -> int:
    """Runs it to its end, printed lines included: Python's own last flush could only print a traceback."""
    try:
        status = program()
    except SystemExit:  # argparse's, after --help
        sys.stdout.flush()
        raise
    except BaseException:
        with suppress(UserError, OSError):  # what ended the program is what is told
            sys.stdout.flush()
        raise
    sys.stdout.flush()
    return status


class _NoReader(BrokenPipeError):
    """Standard output is a pipe that nobody reads any more."""


class _Output:
    """Standard output, its failures told from those of other files and pipes; after one, all else is dropped."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._told():
            return self._stream.write(text)

    def writelines(self, lines: list[str]) -> None:
        with self._told():
            self._stream.writelines(lines)

    def flush(self) -> None:
        with self._told():
            self._stream.flush()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _silence(self._stream)
            if isinstance(error, BrokenPipeError):
                raise _NoReader from error
            raise UserError(
                f"standard output was not written: {error.strerror or error}; free some space, or send it elsewhere"
            ) from error


def open_streams() -> None:
    """Gives streams that are closed (`>&-`) to /dev/null: what prints fails without them, and the next file that is
    opened would have their numbers, and get what libraries write to stderr."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, this one
                os.set_inheritable(number, True)
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # as long as the process lives


def _silence(stream: Any) -> None:
    """Drops what waits in the stream and all that will: Python flushes once more at its end, and a failure there would
    replace the exit status."""
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, stream.fileno())
    os.close(silent)
