"""Which checkpoint to resume from: the newest whose every byte is what was written, judged by all ranks together.

Every file is read once and hashed, the files shared out over the ranks by their size and over a few threads in each
(hashing leaves Python's lock). A rank so reads about its own share of the state once more, and it is the share that it
or a neighbour is about to load. An older checkpoint is read only where the newer one turned out to be damaged.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist

from megatron_taipan.checkpoint.folder import Found, checkpoints, hash_file, incomplete, read_manifest
from megatron_taipan.data.share import share
from megatron_taipan.errors import UserError
from megatron_taipan.parallel.all_ranks import gather_objects, this_rank, world_size

MAX_THREADS = 4  # per rank: a host's ranks share its cores and its file system


def newest_verified(directory: Path) -> Found | None:
    """The newest checkpoint of a run's folder that is complete and unchanged; collective, the same on every rank."""
    return first_undamaged(newest_first(directory))


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
            return hash_file(path / name, flush=False)[1] != files[name][1]
        except OSError:
            return True

    names = list(names)
    with ThreadPoolExecutor(max(1, min(MAX_THREADS, os.cpu_count() or 1, len(names)))) as threads:
        return [name for name, wrong in zip(names, threads.map(differs, names), strict=True) if wrong]


def refuse_damaged(path: Path) -> None:
    """Raises UserError, the same on every rank, if a checkpoint that was asked for by name is damaged; collective."""
    if fault := damage(path):
        raise UserError(f"checkpoint {path} is damaged: {fault}; delete it, or name another")
