"""What one record, and unpacking one file, may take at most: input from strangers can ask for anything."""

import argparse
from dataclasses import dataclass

from megatron_taipan.errors import UserError

MB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """In bytes.

    Attributes:
        record: of one record, unpacked. A long one is kept on the disk while it is read, not in memory.
        window: of what was unpacked before, which some compressed files ask to be kept in memory (zstandard's window,
            the dictionary of xz). zstd itself takes no more than 128 MB either, without --long.
    """

    record: int = 2048 * MB
    window: int = 128 * MB


DEFAULT_LIMITS = Limits()


def add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-record-mb",
        type=int,
        default=DEFAULT_LIMITS.record // MB,
        help="a longer record is an error; while it is read it needs so much disk (default: %(default)s)",
    )
    parser.add_argument(
        "--max-window-mb",
        type=int,
        default=DEFAULT_LIMITS.window // MB,
        help="a .zst or .xz file that needs more memory to be unpacked is an error; 2048 for files of `zstd --long=31`"
        " (default: %(default)s)",
    )


def limits_of(args: argparse.Namespace) -> Limits:
    """What the options ask for.

    Raises:
        UserError: less than 1 MB.
    """
    for name in ("max_record_mb", "max_window_mb"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1 is needed")
    return Limits(args.max_record_mb * MB, args.max_window_mb * MB)


def too_large(limit: int) -> str:
    """What is wrong with a record of more bytes."""
    return f"record too large: over {limit / MB:g} MB; give --max-record-mb more if you want it"
