"""`python -m checkpoints.reshard CHECKPOINT OUT --tensor 4 --processes 16`: a checkpoint laid out for other processes.

A run resumes from a checkpoint of any layout as it is. Laid out ahead, each of its processes reads about its own share
instead of whole tensors, which counts where many processes start from a slow file system. OUT becomes a run's folder
with one checkpoint: continue there with checkpoint.dir=OUT, or from there with checkpoint.load=OUT.

The source is verified first. Parameters, moments, counters and random states are carried over unchanged; one tensor is
in memory at a time.
"""

import argparse
import itertools
import json
import shutil
import sys
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_taipan.checkpoint import calibration, folder
from megatron_taipan.checkpoint.files import TEMPORARY, TensorFile, size_and_sha256
from megatron_taipan.checkpoint.metadata import read_metadata
from megatron_taipan.checkpoint.reader import INDEX, StateReader
from megatron_taipan.checkpoint.verification import refuse_damaged
from megatron_taipan.config import Config
from megatron_taipan.config_loading import load_config, make_config
from megatron_taipan.config_text import dump_config
from megatron_taipan.engine.state_shards import EMA, KINDS, MASTER, MOMENTS, kinds_of
from megatron_taipan.errors import UserError, writing
from megatron_taipan.model.flops import pipeline_bounds
from megatron_taipan.parallel.mesh import ZERO, Coordinates, Mesh, fit_mesh
from megatron_taipan.param_spec import ParamSpec
from megatron_taipan.parameters import parameter_table
from megatron_taipan.programs import exits_cleanly


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program."""
    parser = argparse.ArgumentParser(prog="python -m checkpoints.reshard", description=__doc__.split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path, help="a checkpoint, or a run's folder of checkpoints (the newest)")
    parser.add_argument("out", type=Path, help="a new run's folder; the checkpoint keeps its name in it")
    parser.add_argument("--processes", type=int, help="of the new layout; default: as before")
    parser.add_argument("--tensor", type=int, help="parallel.tensor; default: as before")
    parser.add_argument("--pipeline", type=int, help="parallel.pipeline; default: as before")
    parser.add_argument("--context", type=int, help="parallel.context; default: as before")
    parser.add_argument("--zero-stage", type=int, help="parallel.zero_stage; default: as before")
    options = parser.parse_args(arguments)
    source = folder.locate(str(options.checkpoint))
    refuse_damaged(source)
    config, before = load_config(source / folder.CONFIG), read_metadata(source).get("layout", {})
    wanted = {name: getattr(options, name) for name in ("tensor", "pipeline", "context", "zero_stage")}
    new = with_layout(config, {name: value for name, value in wanted.items() if value is not None})
    p, processes = new.parallel, options.processes
    together = p.tensor * p.context * p.pipeline
    if processes is None:
        processes = before.get("processes") or together
        if processes % together:
            raise UserError(
                f"{source} is of {processes} processes, which tensor {p.tensor} x context {p.context} x pipeline"
                f" {p.pipeline} = {together} does not divide; give --processes, a multiple of {together}"
            )
    with writing(options.out):
        path = reshard(source, options.out, Target(new, processes))
    print(
        f"wrote {path}: {processes} processes, tensor {p.tensor}, pipeline {p.pipeline}, context {p.context},"
        f" zero_stage {p.zero_stage}"
    )
    return 0


def with_layout(config: Config, layout: dict[str, int]) -> Config:
    """The configuration with options of `parallel` replaced; another number of stages is cut by operations.

    Raises:
        ConfigError: they do not go together.
    """
    tree = config.model_dump(mode="json")
    if layout.get("pipeline", config.parallel.pipeline) != config.parallel.pipeline:
        tree["model"]["pattern"] = tree["model"]["pattern"].replace("|", " ")  # cuts for the number of before
    tree["parallel"] |= layout
    return make_config(tree, "the new layout")


@dataclass(frozen=True)
class Target:
    """The new layout: which process holds what.

    Raises:
        UserError: on use, where it does not fit the network or the number of processes.
    """

    config: Config
    processes: int

    @cached_property
    def mesh(self) -> Mesh:
        return fit_mesh(self.processes, self.config.parallel)

    @cached_property
    def table(self) -> dict[str, ParamSpec]:
        return parameter_table(self.config.model, self.config.parallel.tensor)

    @cached_property
    def bounds(self) -> list[int]:
        return pipeline_bounds(self.config.model, self.config.data.seq_len, self.config.parallel.pipeline)

    @property
    def sharers(self) -> int:
        """Processes that share the state of the same parameters."""
        return self.mesh.size(*ZERO)

    def file(self, name: str, sharer: int = 0, tensor: int = 0) -> str:
        """The file of the process that holds tensor `name` at that tensor rank, the sharer's part of it."""
        stage = 0
        if name.startswith("layers."):
            stage = bisect_right(self.bounds, int(name.split(".")[1])) - 1
        elif not name.startswith("embedding."):
            stage = self.config.parallel.pipeline - 1
        return file_name(self.mesh.rank_at(Coordinates(stage, *divmod(sharer, self.mesh.context), tensor)))

    def layout(self) -> dict[str, int]:
        """As metadata.json has it."""
        sizes = {axis: self.mesh.size(axis) for axis in ("tensor", "pipeline", "data", "context")}
        return sizes | {"zero_stage": self.config.parallel.zero_stage, "processes": self.processes}


class Reader(Protocol):
    """What the tensors of a checkpoint to be written come from; StateReader is one."""

    buffers: Any
    optimizer_step: int
    scaler: dict[str, int | float] | None

    def elements(self, name: str, kind: str, spec: ParamSpec, size: int, rank: int, start: int, count: int) -> Tensor:
        """See StateReader.elements."""
        ...

    def buffer(self, name: str) -> Tensor:
        """A buffer by name."""
        ...

    def random_states(self, rank: int) -> dict[str, Tensor]:
        """States of random number generators for a process; may be empty."""
        ...


@dataclass(frozen=True)
class Entry:
    """A tensor of a file to be written."""

    file: str
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]


def reshard(source: Path, out: Path, target: Target) -> Path:
    """Writes the state of checkpoint `source` for another layout; returns the new checkpoint.

    Raises:
        UserError: the layout does not fit, or `out` holds that checkpoint already.
    """
    metadata = read_metadata(source)
    contents, step = metadata.get("contents", folder.FULL), metadata["progress"]["step"]
    final = out / folder.folder_name(step, contents)
    if final.exists():
        raise UserError(f"{final} exists; choose another folder")
    reader = StateReader(source, target.config.model)
    kinds = KINDS if contents == folder.FULL else (MASTER,)
    kinds = (*kinds, EMA) if reader.keeps(EMA) else kinds
    write_checkpoint(final, reader, target, kinds, metadata | {"resharded_from": str(source)}, calibrated=source)
    return final


def write_checkpoint(
    final: Path, reader: Reader, target: Target, kinds: tuple[str, ...], metadata: dict[str, Any],
    calibrated: Path | None = None,
) -> None:  # fmt: skip
    """Writes a checkpoint for a layout: complete at once, or nothing.

    Args:
        kinds: what of each parameter, MASTER and the moments, as far as its optimizer has them.
        calibrated: a checkpoint whose calibrated thresholds, if it has any, are the new one's too.
    """
    index, entries = plan(reader, target, kinds)
    temporary = final.with_name(final.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / folder.STATE).mkdir(parents=True)
    try:
        written = write_files(temporary / folder.STATE, target, entries)
        if calibrated is not None and (calibrated / calibration.CALIBRATION_FILE).is_file():
            shutil.copy(calibrated / calibration.CALIBRATION_FILE, temporary)
        texts = {
            INDEX: json.dumps(index),
            folder.CONFIG: dump_config(target.config),
            folder.METADATA: json.dumps(metadata | {"layout": target.layout()}, indent=1),
        }
        folder.complete_checkpoint(temporary, final, texts, written)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def plan(reader: Reader, target: Target, kinds: tuple[str, ...]) -> tuple[dict[str, Any], list[Entry]]:
    """state/index.json of the new checkpoint, and all that its files hold, in the order that reads the old one once."""
    tensor, entries = target.config.parallel.tensor, []
    parameters: dict[str, list] = {name: [] for name in target.table}
    for name, spec in target.table.items():
        n_ranks, size = tensor if spec.split is not None else 1, torch.Size(spec.local_shape(tensor)).numel()
        width = -(-size // target.sharers)  # as ZeRO 3 cuts it
        kept = kinds_of(spec, target.config.optim)
        held = [kind for kind in kinds if kind in kept or kind not in MOMENTS]
        for kind, rank, sharer in itertools.product(held, range(n_ranks), range(target.sharers)):
            start, count = sharer * width, min(max(size - sharer * width, 0), width)
            if not count:
                continue
            file = target.file(name, sharer, rank)
            if kind == MASTER:
                parameters[name].append([file, rank, start, count])
            load = partial(reader.elements, name, kind, spec, tensor, rank, start, count)
            entries.append(Entry(file, f"{name}|{kind}", (count,), torch.float32, load))
    for name in reader.buffers:
        value = reader.buffer(name)
        load = partial(reader.buffer, name)
        entries.append(Entry(target.file(name), f"{name}|buffer", tuple(value.shape), value.dtype, load))
    states = [reader.random_states(rank) for rank in range(target.processes)]
    for rank, named in enumerate(states):
        for name, value in named.items():
            load = partial(named.__getitem__, name)
            entries.append(Entry(file_name(rank), f"{name}|random", tuple(value.shape), value.dtype, load))
    index = {
        "parameters": parameters, "buffers": {name: target.file(name) for name in reader.buffers}, "tensor": tensor,
        "processes": target.processes if any(states) else 0, "optimizer_step": reader.optimizer_step,
        "scaler": reader.scaler,
    }  # fmt: skip
    return index, entries


def write_files(state: Path, target: Target, entries: list[Entry]) -> dict[str, tuple[int, str]]:
    """Writes every process's file; size and SHA-256 of each by its name in the checkpoint."""
    specs: dict[str, dict] = {file_name(rank): {} for rank in range(target.processes)}
    for entry in entries:
        specs[entry.file][entry.name] = (entry.shape, entry.dtype)
    files = {name: TensorFile(state / name, spec) for name, spec in specs.items()}
    for entry in entries:
        files[entry.file].put(entry.name, entry.load())
    return {f"{folder.STATE}/{name}": size_and_sha256(state / name, flush=True) for name in files}


def file_name(rank: int) -> str:
    return f"rank_{rank:05d}.safetensors"


if __name__ == "__main__":
    sys.exit(main())
