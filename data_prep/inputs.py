"""What is read: input files in order, cut into units of work.

A unit is a few slices of files. Units depend on the inputs alone, never on the number of workers, so their outputs
laid end to end are the same in whichever processes and in however many runs they were made.
"""

import glob
import os

from data_prep import folders
from data_prep.folders import inside
from data_prep.kinds.records import Slice
from data_prep.kinds.registry import input_kind, is_splittable, known_endings
from megatron_taipan.data.sources import natural
from megatron_taipan.errors import UserError

UNITS = 64  # aimed at
SMALLEST_UNIT, LARGEST_UNIT = 256 << 10, 32 << 20  # bytes of input


WorkUnit = tuple[Slice, ...]


def expand(inputs: list[str], known: dict[str, list[str]] | None = None) -> list[str]:
    """Files, folders (searched to the bottom) and globs, as files in the order given, each folder in natural order. A
    line says what of a folder or glob was passed over, and whether names of several splits are among the others.

    Args:
        known: inputs that are not paths, each with its files, which need not be there yet.

    Raises:
        UserError: something does not exist, is of no known kind, cannot be read, is named or reached twice, or has a
            name that is not UTF-8; a saved dataset has several splits; or nothing is left.
    """
    files: list[str] = []
    for name in inputs:
        if known and name in known:
            files += known[name]
            continue
        if os.path.isfile(name):
            if not input_kind(name):
                raise UserError(f"{name} is of no known kind; known are {known_endings()}")
            files.append(name)
            continue
        passed: dict[str, str] = {}
        here = inside(name, passed) if os.path.isdir(name) else _matching(name, passed)
        if not here:
            raise UserError(_nothing(name, passed))
        folders.print_passed_over(name, passed.values(), here)
        files += sorted(here, key=natural)
    for path in files:
        if path.encode(errors="replace").decode() != path:
            raise UserError(f"the name of {os.fsencode(path)!r} is not UTF-8, and the manifest is; rename the file")
    if doubles := named_twice(files):
        raise UserError(f"{doubles[0]} is named twice among the inputs ({len(doubles)} such files); name it once")
    if pairs := _one_file(files):
        raise UserError(f"{pairs[0][1]} is the same file as {pairs[0][0]} ({len(pairs)} such files); name one of them")
    return files


def _nothing(name: str, passed: dict[str, str]) -> str:
    """Why an input gives no file."""
    there = f" (but {folders.counted(passed.values())})" if passed else ""
    if os.path.isdir(name):
        return f"folder {name} holds no file of a known kind{there}; known are {known_endings()}"
    if glob.has_magic(name):
        return f"{name} matches no file of a known kind{there}"
    return f"{name} does not exist"


def _one_file(paths: list[str]) -> list[tuple[str, str]]:
    """Pairs of names of one file: a link and what it leads to, or two links."""
    seen: dict[tuple[int, int], str] = {}
    pairs = []
    for path in paths:
        try:
            about = os.stat(path)
        except OSError:
            continue  # its reader reports it
        first = seen.setdefault((about.st_dev, about.st_ino), path)
        # numbers alone are not trusted: some network file systems repeat them
        if first != path and (about.st_nlink > 1 or os.path.realpath(first) == os.path.realpath(path)):
            pairs.append((first, path))
    return pairs


def named_twice(paths: list[str]) -> list[str]:
    """Those that are there before, however they are spelled; each once, sorted."""
    same: dict[str, list[str]] = {}
    for path in paths:
        same.setdefault(os.path.abspath(path), []).append(path)
    return sorted(spelled[-1] for spelled in same.values() if len(spelled) > 1)


def _matching(pattern: str, passed: dict[str, str]) -> list[str]:
    """Files of a known kind that match a glob, or are in folders that do, each once (`a/**` matches both); what is not
    taken is in `passed`."""
    found: list[str] = []
    for path in glob.glob(pattern, recursive=True):
        if os.path.isdir(path):
            found += inside(path, passed)
        elif folders.is_data(os.path.basename(path)):
            found.append(path)
        else:
            passed[path] = folders.skipped_as(os.path.basename(path))
    return list({os.path.abspath(path): path for path in found}.values())


def work_units(sizes: list[tuple[str, int]]) -> list[WorkUnit]:
    """The units of (file, bytes): large splittable files are cut, small files are put together."""
    total = sum(size for _, size in sizes)
    target = min(max(total // UNITS, SMALLEST_UNIT), LARGEST_UNIT)
    units: list[WorkUnit] = []
    gathered: list[Slice] = []
    held = 0
    for path, size in sizes:
        step = target if is_splittable(path) else max(size, 1)
        for start in range(0, max(size, 1), step):
            part = Slice(path, start, min(start + step, size))
            gathered.append(part)
            held += part.stop - part.start
            if held >= target:
                units.append(tuple(gathered))
                gathered, held = [], 0
    return units + ([tuple(gathered)] if gathered else [])
