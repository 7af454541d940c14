"""How many files this process may have open: every shard of a corpus takes two, and systems begin with 1,024."""

import resource
from contextlib import suppress

FACTOR = 4


def allow_more_files(newest: int) -> None:
    """Raises this process's limit of open files, as far as the system lets it, once half of it is in use.

    Args:
        newest: the handle of a file that was just opened; systems give the lowest free number.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard and 2 * newest >= soft:
        wanted = FACTOR * soft if hard == resource.RLIM_INFINITY else min(FACTOR * soft, hard)
        with suppress(OSError, ValueError):  # macOS allows less than it says
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
