"""Saving and loading the whole training state, by all ranks together."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_taipan.checkpoint import folder
from megatron_taipan.checkpoint.identity import refuse_other_run
from megatron_taipan.errors import UserError

# DeepSpeed writes below this name inside the checkpoint
TAG = folder.STATE


@dataclass
class Progress:
    """How far a run has come. With parameters and optimizer state, all that a resumed run needs: the learning rate,
    the order of samples and the gate's noise are pure functions of these counters."""

    step: int = 0  # optimizer steps taken, skipped ones included
    samples: int = 0  # samples consumed: the loader's place
    tokens: int = 0  # tokens consumed, masked ones included
    skipped: int = 0  # steps skipped because of a non-finite loss or gradient


def save(engine: Any, directory: Path, progress: Progress, *, config_text: str, metadata: dict[str, Any]) -> Path:
    """Writes a checkpoint; collective. Returns its folder.

    Args:
        metadata: written to metadata.json beside the progress; `identity` in it is compared by `load`.

    Raises:
        OSError: the folder cannot be written; the previous checkpoint is untouched.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    final = directory / folder.folder_name(progress.step)
    temporary = directory / (final.name + ".tmp")
    if rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        os.makedirs(temporary)
    dist.barrier()
    engine.save_checkpoint(str(temporary), tag=TAG, client_state=asdict(progress), save_latest=False)
    if rank == 0:
        folder.write_text(temporary / folder.CONFIG, config_text)
        description = {"format": folder.FORMAT, "progress": asdict(progress), **metadata}
        folder.write_text(temporary / folder.METADATA, json.dumps(description, indent=1) + "\n")
    dist.barrier()

    # every rank flushes and hashes its share of the files
    names = sorted(str(p.relative_to(temporary)) for p in temporary.rglob("*") if p.is_file())
    ours = {name: folder.hash_file(temporary / name, flush=True) for name in names[rank::world]}
    shares: list[dict[str, tuple[int, str]]] = [{} for _ in range(world)]
    dist.all_gather_object(shares, ours)
    if rank == 0:
        folder.write_manifest(temporary, {name: entry for share in shares for name, entry in share.items()})
        folder.publish(temporary, final)
    dist.barrier()
    return final


def load(engine: Any, path: Path, *, identity: dict[str, Any]) -> Progress:
    """Reads a checkpoint into the engine; collective.

    Args:
        identity: of this run; see checkpoint.identity.

    Raises:
        UserError: it is another run's, or a file's content is not what was written. The same on every rank.
    """
    metadata = folder.read_metadata(path)
    refuse_other_run(str(path), metadata["identity"], identity)
    verify(path)
    engine.load_checkpoint(str(path), tag=TAG, load_lr_scheduler_states=False)
    return Progress(**metadata["progress"])


def verify(path: Path) -> None:
    """Compares every file with its SHA-256, the work shared out over the ranks; collective.

    Raises:
        UserError: naming the damaged files, the same on every rank.
    """
    names = sorted(folder.read_manifest(path))
    shares: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(shares, folder.wrong_hashes(path, names[dist.get_rank() :: dist.get_world_size()]))
    damaged = sorted(name for share in shares for name in share)
    if damaged:
        raise UserError(f"checkpoint {path} is damaged: {', '.join(damaged)} changed since it was written; delete it")
