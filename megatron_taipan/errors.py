"""The exception type that programs show to their user as a single line, and their exit statuses."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Exit statuses of pretrain.py besides 0 (finished, or stopped at train.stop_at) and 1 (a defect of this package, with
# its traceback); those above 2 by sysexits.h.
EXIT_WRONG_INPUT = 2  # one line says what; another start would find the same
EXIT_UNREACHABLE = 69  # EX_UNAVAILABLE: the processes did not meet; another start may do better
EXIT_HANG = 70  # EX_SOFTWARE: no progress for train.hang_after_s
EXIT_UNSAVED = 74  # EX_IOERR: the state at the end could not be written
EXIT_REQUEUE = 75  # EX_TEMPFAIL: a signal ended it early, with a checkpoint; the batch script starts it again


class UserError(Exception):
    """Something the user gave is wrong: the message says what, with the numbers, and what to do.

    Every command line program prints it as one line on stderr and exits with its status.
    Anything else that is raised is a defect of this package and keeps its traceback.
    """

    exit_status = EXIT_WRONG_INPUT


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what goes wrong while `path` is written (a full disk, a folder without permission) into a UserError."""
    try:
        yield
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise UserError(f"{path} was not written: {error.strerror or error}{where}") from error


def refuse_other_encodings(path: str | os.PathLike[str]) -> None:
    """
    Raises:
        UserError: the absolute path is not UTF-8, as JSON files and the libraries of tokenizers and weights need it.
    """
    absolute = os.path.abspath(path)
    if absolute.encode(errors="replace").decode() != absolute:
        raise UserError(f"the path {os.fsencode(absolute)!r} is not UTF-8; rename its folders or choose another")


def refuse_other_locales(path: str | os.PathLike[str]) -> None:
    """
    Raises:
        UserError: as `refuse_other_encodings`; or the path is other bytes in UTF-8, as which libraries of tokenizers
            and weights take all names, than in the locale's encoding: they would look for another file.
    """
    refuse_other_encodings(path)
    absolute = os.path.abspath(path)
    if os.fsencode(absolute) != absolute.encode():
        raise UserError(
            f"the path {absolute} is not ASCII, and with {sys.getfilesystemencoding()}, the locale's encoding,"
            " libraries of tokenizers and weights do not find it; set PYTHONUTF8=1, or choose another folder"
        )


def divisors(n: int) -> str:
    """The divisors of n up to 64, as text for an error message."""
    return ", ".join(str(d) for d in range(1, min(n, 64) + 1) if n % d == 0)
