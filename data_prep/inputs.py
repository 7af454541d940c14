"""What is read: input files in order, cut into pieces of work.

A piece is a few slices of files. Pieces depend on the inputs alone, never on the number of workers, so their outputs
laid end to end are the same whoever made them and in however many runs.
"""

import glob
import os
from dataclasses import dataclass
from pathlib import Path

import orjson

from megatron_taipan.data.sources import natural
from megatron_taipan.errors import UserError

KINDS = (".jsonl", ".txt", ".parquet", ".arrow")
TABLES = (".parquet", ".arrow")
COMPRESSED = (".gz", ".zst")
SPLITTABLE = (".jsonl",)  # a worker can start in the middle of these, at the next line
PIECES = 64  # aimed at
SMALLEST_PIECE, LARGEST_PIECE = 256 << 10, 32 << 20  # bytes of input


@dataclass(frozen=True)
class Slice:
    """Bytes [start, stop) of one file; of a file that cannot be cut, all of it."""

    path: str
    start: int
    stop: int


Piece = tuple[Slice, ...]


def kind_of(path: str) -> str | None:
    """`.jsonl`, `.jsonl.gz`, `.txt.zst`, ... or None where the name says nothing that we read."""
    stem, ending = os.path.splitext(path.lower())
    packed = ending if ending in COMPRESSED else ""
    kind = os.path.splitext(stem)[1] if packed else ending
    return kind + packed if kind in KINDS and not (packed and kind in TABLES) else None


def expand(inputs: list[str]) -> list[str]:
    """Files, folders (searched to the bottom) and globs, as files in the order given, each folder in natural order.

    Raises:
        UserError: something does not exist, is of no known kind, cannot be read, is named twice, or has a name that is
            no UTF-8; or nothing is left.
    """
    files: list[str] = []
    for name in inputs:
        if os.path.isfile(name):
            if not kind_of(name):
                raise UserError(f"{name} is of no known kind; known are {known_kinds()}")
            files.append(name)
        elif os.path.isdir(name):
            inside = _inside(name)
            if not inside:
                raise UserError(f"folder {name} holds no file of a known kind; known are {known_kinds()}")
            files += sorted(inside, key=natural)
        elif found := _matching(name):
            files += sorted(found, key=natural)
        else:
            raise UserError(
                f"{name} does not exist" if not glob.has_magic(name) else f"{name} matches no file of a known kind"
            )
    for path in files:
        if path.encode(errors="replace").decode() != path:
            raise UserError(f"the name of {os.fsencode(path)!r} is no UTF-8, and the manifest is; rename the file")
    if doubles := named_twice(files):
        raise UserError(f"{doubles[0]} is named twice among the inputs ({len(doubles)} such files); name it once")
    return files


def named_twice(paths: list[str]) -> list[str]:
    """Those that stand there before, however they are spelled; each once, sorted."""
    same: dict[str, list[str]] = {}
    for path in paths:
        same.setdefault(os.path.abspath(path), []).append(path)
    return sorted(spelled[-1] for spelled in same.values() if len(spelled) > 1)


def _inside(folder: str) -> list[str]:
    """Files of a known kind in a folder, to the bottom, through links to folders too. Nothing is passed over in
    silence: a folder that cannot be read is refused, and a link to nothing is taken, to be reported by its reader."""

    def refuse(error: OSError) -> None:
        raise UserError(f"folder {error.filename} cannot be read: {error.strerror}") from error

    found: list[str] = []
    seen: set[str] = set()
    for place, folders, files in os.walk(str(Path(folder)), onerror=refuse, followlinks=True):
        folders.sort()  # of several ways to one folder always the same is taken
        real = os.path.realpath(place)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if "state.json" in files:
            files = _saved(place) or files
        found += [path for name in files if kind_of(path := os.path.join(place, name))]
    return found


def _saved(folder: str) -> list[str]:
    """The files of a dataset that Hugging Face datasets saved: no others, since `map` leaves its results beside them,
    and all of them, since a missing one must be reported. Empty for any other folder."""
    try:
        return [entry["filename"] for entry in orjson.loads(Path(folder, "state.json").read_bytes())["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _matching(pattern: str) -> list[str]:
    """Files of a known kind that match a glob, or lie in folders that do, each once (`a/**` matches both)."""
    found: list[str] = []
    for path in glob.glob(pattern, recursive=True):
        found += _inside(path) if os.path.isdir(path) else [path] if kind_of(path) else []
    return list({os.path.abspath(path): path for path in found}.values())


def known_kinds() -> str:
    return ", ".join(KINDS) + "; .jsonl and .txt also with " + " or ".join(COMPRESSED)


def cut(sizes: list[tuple[str, int]]) -> list[Piece]:
    """The pieces of (file, bytes): large splittable files are cut, small files are put together."""
    total = sum(size for _, size in sizes)
    target = min(max(total // PIECES, SMALLEST_PIECE), LARGEST_PIECE)
    pieces: list[Piece] = []
    gathered: list[Slice] = []
    held = 0
    for path, size in sizes:
        step = target if kind_of(path) in SPLITTABLE else max(size, 1)
        for start in range(0, max(size, 1), step):
            part = Slice(path, start, min(start + step, size))
            gathered.append(part)
            held += part.stop - part.start
            if held >= target:
                pieces.append(tuple(gathered))
                gathered, held = [], 0
    return pieces + ([tuple(gathered)] if gathered else [])
