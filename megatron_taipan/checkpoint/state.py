"""Saving and loading the whole training state, by all ranks together, from any layout to any layout.

Every element of the state is written once: a rank writes the pieces that its optimizer updates (stage 0: its share of
what all replicas hold), and of parameters that every tensor rank holds only tensor rank 0 writes. A rank that loads
asks for its own pieces, and `StateReader` finds them in whatever layout they were written.
"""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taipan.checkpoint import folder
from megatron_taipan.checkpoint.identity import refuse_other_run
from megatron_taipan.checkpoint.pieces import (
    KINDS,
    Piece,
    buffers,
    held_pieces,
    optimizer_step,
    scaler_state,
    set_optimizer_step,
    set_scaler_state,
    spread_masters,
)
from megatron_taipan.checkpoint.reader import INDEX, StateReader
from megatron_taipan.checkpoint.tensorfile import write_tensors
from megatron_taipan.config import Config, dump_config, load_config
from megatron_taipan.errors import UserError
from megatron_taipan.parallel.groups import Groups
from megatron_taipan.parallel.layout import ParamSpec, describe


class SaveFailed(UserError):
    """A checkpoint could not be written; the one before is untouched, and training may go on."""


@dataclass
class Progress:
    """How far a run has come. With parameters and optimizer state, all that a resumed run needs: the learning rate,
    the order of samples and the gate's noise are pure functions of these counters, and nothing else is random."""

    step: int = 0  # optimizer steps taken, skipped ones included
    samples: int = 0  # samples consumed: the loader's place
    tokens: int = 0  # tokens consumed, masked ones included
    skipped: int = 0  # steps skipped because of a non-finite loss or gradient
    recent: list[float] = field(default_factory=list)  # the last losses, where spikes are looked for (train/spikes.py)
    rewinds: list[dict[str, Any]] = field(default_factory=list)  # each: from which step to which, samples passed over


class Saving:
    """A checkpoint on its way to the disk; made and finished by all ranks together.

    Making it copies this rank's part of the state to the host's memory, then a thread writes the copy while training
    goes on. Neither DeepSpeed's own asynchronous engines (they need a GPU or packages of their own) nor
    torch.distributed.checkpoint (it knows no ZeRO partitions) fit here; one thread writing one file needs no engine.

    Raises:
        SaveFailed: on all ranks, if the folder cannot be made.
    """

    def __init__(
        self,
        engine: Any,
        directory: Path,
        progress: Progress,
        *,
        config: Config,
        metadata: dict[str, Any],
        groups: Groups,
    ):
        self.progress, self.config, self.metadata = progress, config, metadata
        self.final = directory / folder.folder_name(progress.step)
        self.temporary = directory / (self.final.name + ".tmp")
        self.file = f"{folder.STATE}/rank_{dist.get_rank():05d}.safetensors"
        pieces = held_pieces(engine, groups.data_rank)
        self.tensors, self.index = own_tensors(engine, pieces, config, groups, Path(self.file).name)
        self.whole = {
            "tensor": config.parallel.tensor,
            "optimizer_step": optimizer_step(pieces),
            "scaler": scaler_state(engine),
        }
        on_all_ranks(self._make_folder)
        self.written: dict[str, tuple[int, str]] = {}
        self.fault: OSError | None = None
        self.seconds = 0.0  # of this rank's writing
        self.thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self.thread.start()

    def writing(self) -> bool:
        """Whether this rank's part is still being written."""
        return self.thread.is_alive()

    def finish(self) -> Path:
        """Waits for every rank's part and completes the checkpoint; collective. Returns its folder.

        Raises:
            SaveFailed: on all ranks, if any of them could not write; what was written is removed.
        """
        self.thread.join()
        try:
            on_all_ranks(self._raise_fault)
            shares: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(shares, (self.written, self.index))
            on_all_ranks(lambda: self._complete(shares) if dist.get_rank() == 0 else None)
        except SaveFailed:
            if dist.get_rank() == 0:
                shutil.rmtree(self.temporary, ignore_errors=True)  # a full disk has better use for the space
            raise
        return self.final

    def _make_folder(self) -> None:
        if dist.get_rank() == 0:
            shutil.rmtree(self.temporary, ignore_errors=True)
            os.makedirs(self.temporary / folder.STATE)

    def _write(self) -> None:
        began = time.perf_counter()
        try:
            self.written = {self.file: write_tensors(self.temporary / self.file, self.tensors)}
        except OSError as error:
            self.fault = error
        self.tensors = {}
        self.seconds = time.perf_counter() - began

    def _raise_fault(self) -> None:
        if self.fault is not None:
            raise self.fault

    def _complete(self, shares: list[tuple[dict, dict]]) -> None:
        description = {"format": folder.FORMAT, "progress": asdict(self.progress), **self.metadata}
        texts = {
            INDEX: json.dumps(join_indices([index for _, index in shares]) | self.whole),
            folder.CONFIG: dump_config(self.config),
            folder.METADATA: json.dumps(description, indent=1),
        }
        for name, text in texts.items():
            folder.write_text(self.temporary / name, text + "\n")
        files = {name: folder.hash_file(self.temporary / name, flush=True) for name in texts}
        for written, _ in shares:
            files |= written
        folder.write_manifest(self.temporary, files)
        folder.publish(self.temporary, self.final)


def own_tensors(
    engine: Any, pieces: list[Piece], config: Config, groups: Groups, file: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What this rank writes, copied to the CPU, and its part of the index.

    The copies are what makes it safe to train on while they are written.
    """
    table = describe(config.model, config.parallel.tensor)
    tensors: dict[str, Tensor] = {}
    index: dict[str, Any] = {"parameters": {}, "buffers": {}}
    if config.parallel.zero_stage == 0:
        pieces = [piece.part(groups.data_rank, groups.data_size) for piece in pieces]
    for piece in pieces:
        split = _row(table, piece.name).split is not None
        if piece.replica or not piece.count or (not split and groups.tensor.rank > 0):
            continue
        for kind in KINDS:
            tensors[f"{piece.name}|{kind}"] = piece.tensor(kind).to("cpu", torch.float32, copy=True)
        tensor_rank = groups.tensor.rank if split else 0
        index["parameters"][piece.name] = [[file, tensor_rank, piece.start, piece.count]]
    if groups.data_rank == 0 and groups.tensor.rank == 0:
        for name, value in buffers(engine.module):
            tensors[f"{name}|buffer"] = value.detach().to("cpu", copy=True).contiguous()
            index["buffers"][name] = file
    return tensors, index


def join_indices(shares: list[dict[str, Any]]) -> dict[str, Any]:
    """The index of the whole checkpoint from all ranks' parts."""
    parameters: dict[str, list] = {}
    named_buffers: dict[str, str] = {}
    for share in shares:
        named_buffers |= share["buffers"]
        for name, runs in share["parameters"].items():
            parameters.setdefault(name, []).extend(runs)
    return {"parameters": parameters, "buffers": named_buffers}


def load(engine: Any, path: Path, *, config: Config, identity: dict[str, Any], groups: Groups) -> Progress:
    """Reads a checkpoint of any layout into the engine; collective.

    Args:
        identity: of this run; see checkpoint.identity.

    Raises:
        UserError: it is another run's, or a file's content is not what was written. The same on every rank.
    """
    metadata = folder.read_metadata(path)
    refuse_other_run(str(path), metadata["identity"], identity)
    verify(path)
    reader = StateReader(path, load_config(path / folder.CONFIG).model)
    table = describe(config.model, config.parallel.tensor)
    pieces = held_pieces(engine, groups.data_rank)
    tp = groups.tensor
    for kind in KINDS:
        for piece in pieces:
            spec = _row(table, piece.name)
            values = reader.elements(piece.name, kind, spec, tp.size, tp.rank, piece.start, piece.count)
            piece.tensor(kind).copy_(values)
    set_optimizer_step(pieces, reader.optimizer_step)
    set_scaler_state(engine, reader.scaler)
    for name, value in buffers(engine.module):
        value.copy_(reader.buffer(name))
    spread_masters(engine)
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


def on_all_ranks(action: Callable[[], Any]) -> Any:
    """Runs `action`; if the operating system refuses it on any rank, SaveFailed is raised on all.

    Without this the others would wait for the failing rank in the next collective.
    """
    result, fault = None, None
    try:
        result = action()
    except OSError as error:
        fault = f"rank {dist.get_rank()}: {error.strerror or error} ({error.filename or 'checkpoint.dir'})"
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    found = [text for text in faults if text is not None]
    if found:
        raise SaveFailed(f"the checkpoint was not written: {found[0]}")
    return result


def _row(table: dict[str, ParamSpec], name: str) -> ParamSpec:
    if name not in table:
        raise KeyError(f"parameter {name} is missing from parallel.layout.describe: add a row for it")
    return table[name]
