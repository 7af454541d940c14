"""The folder of a run's checkpoints, and the protocol that leaves no half-written one behind.

    DIR/step_00000200/        one checkpoint, complete
        manifest.json         every file's size and SHA-256; written last, so it marks the checkpoint complete
        metadata.json         step, samples, layout, versions, git commit, data fingerprint
        config.yaml           the resolved configuration
        state/                parameters and optimizer state
    DIR/weights_00000250/     the same with parameters only; read by everything but a run that resumes
    DIR/step_00000300.tmp/    being written; what a killed run leaves behind, and the next one removes
    DIR/latest                name of the newest complete checkpoint, replaced atomically

A checkpoint is written under its temporary name by all ranks, every file is flushed to the disk and hashed, the
manifest is written, and only then is the folder renamed. All ranks must see the same folder.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_taipan.checkpoint.files import TEMPORARY, flush_folder, size_and_sha256, write_text
from megatron_taipan.errors import UserError
from megatron_taipan.untrusted import parse_json, plain_name

MANIFEST = "manifest.json"
METADATA = "metadata.json"
CONFIG = "config.yaml"
STATE = "state"
LATEST = "latest"
FORMAT = 1  # of the manifest and the metadata
FULL, WEIGHTS = "step", "weights"  # what a folder's name begins with
NAME = re.compile(r"(step|weights)_(\d{8,})")


@dataclass(frozen=True)
class Found:
    """A checkpoint that may be resumed from, and the newer ones that were passed over, each with the reason."""

    path: Path
    passed_over: list[str]


def folder_name(step: int, kind: str = FULL) -> str:
    """The name of the checkpoint after `step` steps."""
    return f"{kind}_{step:08d}"


def step_of(path: Path, kind: str = FULL) -> int | None:
    """The step that a folder's name carries; None if it is not the name of a checkpoint of that kind."""
    match = NAME.fullmatch(path.name)
    return int(match.group(2)) if match and match.group(1) == kind else None


def checkpoints(directory: Path, kind: str = FULL) -> list[Path]:
    """Folders with a checkpoint's name, oldest first, complete or not."""
    if not directory.is_dir():
        return []
    found = [p for p in directory.iterdir() if step_of(p, kind) is not None and p.is_dir()]
    return sorted(found, key=lambda p: step_of(p, kind) or 0)


def find_newest(directory: Path) -> Found | None:
    """The newest complete checkpoint, sizes checked, for readers; None where there is none. A run that resumes
    asks `verification.find_checkpoint`.

    `latest` is not needed: the folders' names and manifests say it all. It is written for people and other programs.
    """
    passed_over: list[str] = []
    for path in reversed(checkpoints(directory)):
        fault = incomplete(path)
        if fault is None:
            return Found(path, passed_over)
        passed_over.append(f"{path.name}: {fault}")
    return None


def incomplete(path: Path) -> str | None:
    """Why a checkpoint must not be used: no manifest, a file missing or of the wrong size. None if it is complete."""
    try:
        files = read_manifest(path)
    except UserError as error:
        return str(error)
    for name, (size, _) in files.items():
        try:
            actual = (path / name).stat().st_size
        except OSError:
            return f"{name} is missing"
        if actual != size:
            return f"{name} has {actual} bytes, its manifest says {size}"
    return None


def read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Size in bytes and SHA-256 of every file.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        manifest = parse_json((path / MANIFEST).read_text(encoding="utf-8"))
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        raise UserError(f"it has no {MANIFEST}, so it was never completed") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"its {MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    for name in files:
        if not plain_name(name.removeprefix(STATE + "/")):
            raise UserError(f"its {MANIFEST} names {name[:200]!r}, which is not a file of a checkpoint")
    return files


def locate(place: str) -> Path:
    """The checkpoint that a user's path means: a checkpoint itself, or the newest complete one of a run's folder.

    Raises:
        UserError: there is none.
    """
    path = Path(place)
    if not path.is_dir():
        raise UserError(f"checkpoint {place}: no such folder")
    if is_checkpoint(path):
        fault = incomplete(path)
        if fault:
            raise UserError(f"checkpoint {place} is not complete: {fault}")
        return path
    found = find_newest(path)
    if found is None:
        raise UserError(f"{place} holds no complete checkpoint (folders named {folder_name(0)} and so on)")
    return found.path


def is_checkpoint(path: Path) -> bool:
    """Whether a folder is a checkpoint itself, complete or not, rather than a run's folder of them."""
    return (path / METADATA).exists() or (path / MANIFEST).exists()


def remove_leftovers(directory: Path) -> list[str]:
    """Deletes what killed runs left half written; returns the names."""
    gone = []
    for path in (p for kind in (FULL, WEIGHTS) for p in directory.glob(f"{kind}_*{TEMPORARY}")):
        shutil.rmtree(path, ignore_errors=True)
        gone.append(path.name)
    (directory / (LATEST + TEMPORARY)).unlink(missing_ok=True)
    return gone


def write_manifest(path: Path, files: dict[str, tuple[int, str]]) -> None:
    """Marks the checkpoint complete."""
    entries = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(files.items())}
    write_text(path / MANIFEST, json.dumps({"format": FORMAT, "files": entries}, indent=1) + "\n")
    for folder in {path / name for name in files} | {path / MANIFEST}:
        flush_folder(folder.parent)


def complete_checkpoint(
    temporary: Path, final: Path, texts: dict[str, str], written: dict[str, tuple[int, str]]
) -> None:
    """Writes a checkpoint's small files and its manifest, then gives it its name.

    Args:
        texts: content by file name.
        written: size and SHA-256 of the files that are there already, durable.
    """
    for name, text in texts.items():
        write_text(temporary / name, text + "\n")
    files = {name: size_and_sha256(temporary / name, flush=True) for name in texts}
    write_manifest(temporary, files | written)
    publish(temporary, final)


def publish(temporary: Path, final: Path) -> None:
    """Gives a finished checkpoint its name and, if a run may resume from it, points `latest` at it."""
    if final.exists():  # a checkpoint of this step that was passed over as damaged
        shutil.rmtree(final)
    os.rename(temporary, final)
    flush_folder(final.parent)
    if step_of(final) is not None:
        write_text(final.parent / LATEST, final.name + "\n")


def remove_old(
    directory: Path,
    *,
    keep_last: int | None,
    keep_every: int | None,
    kind: str = FULL,
    written: int | None = None,
    hold: Callable[[Path], bool] | None = None,
) -> list[str]:
    """Deletes all but the newest `keep_last` checkpoints and those at multiples of `keep_every` steps.

    Only complete ones count as kept, so that damaged ones never push out a good one; and none of a step after
    `written`, the checkpoint just written, which those would push out that a run passed over or took back. `hold` is
    asked of each that would be deleted, and keeps it this time: something reads it. Returns the deleted names.
    """
    if keep_last is None:
        return []
    finished = [p for p in checkpoints(directory, kind) if incomplete(p) is None]
    if written is not None:
        finished = [p for p in finished if (step_of(p, kind) or 0) <= written]
    return [
        path.name
        for path in finished[:-keep_last]
        if not (keep_every and (step_of(path, kind) or 0) % keep_every == 0)
        and not (hold is not None and hold(path))
        and _delete(path)
    ]


def remove_taken_back(directory: Path, *, after: int, until: int) -> None:
    """Deletes the checkpoints of steps that a run took back, `after` + 1 to `until`: a resume would take the newest."""
    for kind in (FULL, WEIGHTS):
        for path in checkpoints(directory, kind):
            if after < (step_of(path, kind) or 0) <= until:
                _delete(path)
    with suppress(OSError):  # for people: the next checkpoint puts it right
        if (directory / folder_name(after)).exists():
            write_text(directory / LATEST, folder_name(after) + "\n")


def _delete(path: Path) -> bool:
    """Deletes a checkpoint, of a link only the link; False if the disk refuses now."""
    # the manifest goes first: a deletion that is cut short must not look like a checkpoint
    try:
        if path.is_symlink():  # to another run's checkpoint, with which this one began
            path.unlink()
            return True
        (path / MANIFEST).unlink()
    except OSError:
        return False
    shutil.rmtree(path, ignore_errors=True)
    return True
