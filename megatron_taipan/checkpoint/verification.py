"""Which checkpoint to continue from: the newest of which every byte is as written, decided by all ranks together.

Every file is read once and hashed, the files shared out over the ranks by their size and over a few threads in each
(hashing leaves Python's lock). A rank so reads about its own share of the state once more, and it is the share that it
or a neighbour is about to load. An older checkpoint is read only where the newer one turned out to be damaged.

A run that ended because its loss was not finite asks for more: a state with such a value never recovers.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from megatron_taipan.checkpoint.files import size_and_sha256
from megatron_taipan.checkpoint.folder import (
    STATE,
    WEIGHTS,
    Found,
    checkpoints,
    incomplete,
    is_checkpoint,
    read_manifest,
    step_of,
)
from megatron_taipan.checkpoint.metadata import read_metadata
from megatron_taipan.checkpoint.reader import READ_ELEMENTS
from megatron_taipan.config import Config
from megatron_taipan.data.share import share
from megatron_taipan.engine.state_shards import EMA, KINDS
from megatron_taipan.errors import UserError
from megatron_taipan.parallel.all_ranks import gather_objects, this_rank, world_size

MAX_THREADS = 4  # per rank: a host's ranks share its cores and its file system


def find_checkpoint(config: Config) -> Found | None:
    """The verified checkpoint to start from, by checkpoint.load; None for a new run. Collective, the same everywhere.

    Raises:
        UserError: a new run was asked for in a folder that holds one, or the wanted checkpoint is not there.
    """
    refuse_load(config)
    directory, wanted = Path(config.checkpoint.dir), config.checkpoint.load
    if wanted is None:
        return None
    found = newest_verified(directory)
    if found is None and (there := checkpoints(directory)):
        raise UserError(f"{directory} holds only damaged checkpoints ({names_of(there)}); delete them to start again")
    if found is not None or wanted == "auto":
        return found
    if is_checkpoint(Path(wanted)):
        refuse_damaged(Path(wanted))
        return Found(Path(wanted), [])
    found = newest_verified(Path(wanted))
    if found is None:
        damaged = names_of(checkpoints(Path(wanted)))
        raise UserError(f"checkpoint.load={wanted} holds only damaged checkpoints ({damaged}); name another folder")
    return found


def names_of(folders: list[Path]) -> str:
    return ", ".join(folder.name for folder in folders)


def refuse_load(config: Config) -> None:
    """Raises UserError where checkpoint.load cannot be meant, as is seen without verifying a checkpoint."""
    directory, wanted = Path(config.checkpoint.dir), config.checkpoint.load
    there = checkpoints(directory)
    if wanted is None and there:
        raise UserError(
            f"checkpoint.load=null starts a new run, but {directory} holds checkpoints up to {there[-1].name};"
            " choose another checkpoint.dir, or checkpoint.load=auto to resume"
        )
    if wanted is None or wanted == "auto" or there:
        return
    if not is_checkpoint(Path(wanted)):
        if not checkpoints(Path(wanted)):
            raise UserError(f"checkpoint.load={wanted} holds no complete checkpoint")
    elif read_metadata(Path(wanted)).get("contents") == WEIGHTS:
        raise UserError(f"checkpoint.load={wanted} holds weights only; start a new run with checkpoint.init={wanted}")


def rewind_target(directory: Path, save_every: int) -> Path | None:
    """The newest verified checkpoint of the regular cadence, so that one written by a stop on the way changes nothing.

    Where none of the cadence is left, the newest; None before the first. Collective, the same on every rank.
    """
    there = newest_first(directory)
    regular = [path for path in there if save_every and (step_of(path) or 0) % save_every == 0]
    others = [path for path in there if path not in regular]
    found = first_undamaged([*regular, *others])
    return found.path if found else None


def newest_verified(directory: Path) -> Found | None:
    """The newest checkpoint of a run's folder that is complete and unchanged; collective, the same on every rank."""
    return first_undamaged(newest_first(directory))


def newest_sound(directory: Path) -> Found | None:
    """The newest checkpoint of a run that is complete, unchanged and finite; collective, the same on every rank."""
    return first_without(lambda path: damage(path) or _not_finite(path), newest_first(directory))


def where_to_go_on(directory: Path, step: int) -> str:
    """Which checkpoint a run can continue from whose loss was last finite at `step`; collective."""
    sound = newest_sound(directory)
    if sound is None:
        return f"no checkpoint in {directory} is sound: start again, in another checkpoint.dir or with this one emptied"
    unsound = "".join(f"; {text}: delete it, or a resume takes it" for text in sound.passed_over)
    last = "nothing was updated since, and " if step_of(sound.path) == step else ""
    return f"{last}{sound.path} is sound (complete, every value finite): the same command goes on from there{unsound}"


def newest_first(directory: Path) -> list[Path]:
    """A run's checkpoints as rank 0 sees them; collective.

    Ranks whose view of a shared folder lags behind would otherwise choose another, and verify others together.
    """
    names: list[list[str]] = [[path.name for path in reversed(checkpoints(directory))]]
    if world_size() > 1:
        dist.broadcast_object_list(names, src=0)
    return [directory / name for name in names[0]]


def first_undamaged(paths: list[Path]) -> Found | None:
    """The first of these checkpoints, the same on every rank, that is complete and unchanged; collective."""
    return first_without(damage, paths)


def first_without(fault_of: Callable[[Path], str | None], paths: list[Path]) -> Found | None:
    """The first of these checkpoints of which `fault_of`, collective and the same on every rank, finds none."""
    passed_over: list[str] = []
    for path in paths:
        fault = fault_of(path)
        if fault is None:
            return Found(path, passed_over)
        passed_over.append(f"{path.name}: {fault}")
    return None


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing is; collective, the same on every rank."""
    fault, changed = incomplete(path), []
    if fault is None:
        sizes = [(size, name) for name, (size, _) in read_manifest(path).items()]
        changed = wrong_hashes(path, share(sizes, world_size(), this_rank()))
    answers = gather_objects((fault, changed))
    names = sorted(name for _, found in answers for name in found)
    first = next((text for text, _ in answers if text is not None), None)
    return first or (f"{', '.join(names)} changed since it was written" if names else None)


def wrong_hashes(path: Path, names: Iterable[str]) -> list[str]:
    """Which of these files do not have the content that the manifest promises, or cannot be read."""
    files = read_manifest(path)

    def differs(name: str) -> bool:
        try:
            return size_and_sha256(path / name, flush=False)[1] != files[name][1]
        except OSError:
            return True

    names = list(names)
    with ThreadPoolExecutor(max(1, min(MAX_THREADS, os.cpu_count() or 1, len(names)))) as threads:
        return [name for name, wrong in zip(names, threads.map(differs, names), strict=True) if wrong]


def refuse_damaged(path: Path) -> None:
    """Raises UserError, the same on every rank, if a checkpoint that was asked for by name is damaged; collective."""
    if fault := damage(path):
        raise UserError(f"checkpoint {path} is damaged: {fault}; delete it, or name another")


def _not_finite(path: Path) -> str | None:
    """What is not finite in a complete checkpoint, None if all is; the files are shared out over the ranks."""
    sizes = [(size, name) for name, (size, _) in read_manifest(path).items() if name.endswith(".safetensors")]
    names = [found for file in share(sizes, world_size(), this_rank()) if (found := _first_not_finite(path / file))]
    return next((name for answer in gather_objects(names) for name in answer), None)


def _first_not_finite(file: Path) -> str | None:
    try:
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():
                if name.rpartition("|")[2] in (*KINDS, EMA):
                    view = opened.get_slice(name)
                    (count,) = view.get_shape()  # a run of elements, see reader.py
                    for at in range(0, count, READ_ELEMENTS):
                        if not np.isfinite(view[at : min(at + READ_ELEMENTS, count)]).all():
                            return f"{name.replace('|', ' (')}) in {STATE}/{file.name} is not finite"
    except (SafetensorError, ValueError, TypeError) as error:
        return f"{STATE}/{file.name} is damaged: {error}"
    return None
