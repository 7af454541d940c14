"""A folder that gets its name only when it is complete, in place of an earlier one if there is one.

    PARENT/.NAME.XXXXXXXX.partial    being written, locked by who writes it
    PARENT/.NAME.XXXXXXXX.earlier    what had the name before, between two renames

A killed program leaves one of these; the next one for the same name removes the first and, where nothing has the
name, puts back the second. The lock is the operating system's, so a process that dies holds none.
"""

import fcntl
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from megatron_taipan.checkpoint.files import flush_folder
from megatron_taipan.errors import UserError

PARTIAL, EARLIER = ".partial", ".earlier"


@contextmanager
def whole_folder(out: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Gives an empty folder to fill; it takes the name `out` at the end, and vanishes if an exception comes through.

    The caller flushes the files in it to the disk.

    Args:
        overwrite: in place of what has the name then.

    Raises:
        UserError: without `overwrite`, something has got the name meanwhile.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    work, handle = _new(out)
    earlier = work.with_suffix(EARLIER)
    try:
        yield work
        if out.exists():
            if not overwrite:
                raise UserError(f"{out} was made by another program meanwhile; choose another folder")
            out.rename(earlier)  # at once: a folder whose deletion is cut short must not have the name
        work.rename(out)
        flush_folder(out.parent)
        with suppress(FileNotFoundError):  # nothing was there
            earlier.rename(work)  # from here on it may be removed, whenever we are killed
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(handle)


def remove_or_restore_leftovers(out: Path) -> list[str]:
    """Removes what killed programs left of `out`, or puts it back; returns a sentence for each."""
    ours, said = re.compile(rf"\.{re.escape(out.name)}\.[a-z0-9_]{{8}}\.(partial|earlier)"), []
    found = out.parent.iterdir() if out.parent.is_dir() else ()
    for path in sorted(path for path in found if ours.fullmatch(path.name)):
        try:
            handle = _lock(path.with_suffix(PARTIAL))
        except FileNotFoundError:
            handle = None  # an earlier folder; the one that replaced it is gone
        except BlockingIOError:
            continue  # somebody is writing it
        except OSError:
            said.append(f"left {path} alone: without file locks it is unknown whether it is being written")
            continue
        if path.suffix == EARLIER and not out.exists():
            path.rename(out)
            said.append(f"put {out} back, which a killed program had set aside")
        else:
            shutil.rmtree(path, ignore_errors=True)
            said.append(f"removed {path}, which a killed program had left")
        if handle is not None:
            os.close(handle)
    return said


def _make_beside(out: Path) -> Path:
    """An empty folder with what any new one there gets: the umask's permissions, and group and access lists of a shared
    place. tempfile's are its owner's alone, and chmod would drop the group's bit."""
    while True:
        work = out.parent / f".{out.name}.{secrets.token_hex(4)}{PARTIAL}"
        try:
            work.mkdir()
        except FileExistsError:
            continue
        return work


def _new(out: Path) -> tuple[Path, int]:
    """An empty folder beside `out`, and the handle that holds its lock."""
    while True:
        work = _make_beside(out)
        try:
            handle = _lock(work)
        except (BlockingIOError, FileNotFoundError):
            continue  # taken for a leftover before it was locked
        except OSError:
            handle = os.open(work, os.O_RDONLY)  # a file system without locks: nothing to hold
        if work.exists():
            return work, handle
        os.close(handle)


def _lock(folder: Path) -> int:
    """A handle of the folder that holds its lock until it is closed; a process that is started does not inherit it.

    Raises:
        BlockingIOError: another process holds it. FileNotFoundError: the folder does not exist.
        OSError: this file system has no locks.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle
