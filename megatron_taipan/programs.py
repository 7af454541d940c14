"""How command line programs end: a line for what is wrong, and a status.

Their standard streams are taken as shells and clusters leave them: closed, a pipe that nobody reads, Latin-1.
"""

import io
import os
import select
import signal
import sys
from collections.abc import Callable
from functools import wraps
from typing import TextIO

from megatron_taipan.errors import UserError


def exits_cleanly(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wraps a program's `main`: a UserError becomes `error: ...` on stderr and its exit status; the rest is
    `with_streams`'s."""

    @wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            return with_streams(lambda: main(*args, **kwargs) or 0)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return error.exit_status

    return run


def with_streams(program: Callable[[], int]) -> int:
    """Runs a program, whatever its standard streams are, and gives its exit status.

    A character that the locale's encoding lacks is printed as an escape. A reader that has enough, as `head`, ends the
    program without a word, with the status that SIGPIPE gives (141).
    """
    open_streams()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr does
    try:
        status = program()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _unread(sys.stdout):
            raise
        silent = os.open(os.devnull, os.O_WRONLY)  # for Python, which flushes once more at its end
        os.dup2(silent, sys.stdout.fileno())
        os.close(silent)
        return 128 + signal.SIGPIPE


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


def _unread(stream: TextIO) -> bool:
    """Whether the stream is a pipe that nobody reads any more."""
    try:
        poll = select.poll()
        poll.register(stream.fileno(), select.POLLOUT)
        return any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0))
    except (OSError, ValueError):  # not a file
        return False
