"""The one exception type that a program shows to its user as a single line."""

import sys
from collections.abc import Callable
from functools import wraps


class UserError(Exception):
    """Something the user gave is wrong: the message says what, with the numbers, and what to do.

    Every command line program prints it as one line on stderr and exits with its status.
    Anything else that is raised is a defect of ours and keeps its traceback.
    """

    exit_status = 2


def exits_cleanly(main: Callable[..., int | None]) -> Callable[..., int]:
    """Wraps a program's `main`: a UserError becomes `error: ...` on stderr and its exit status."""

    @wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return error.exit_status

    return run
