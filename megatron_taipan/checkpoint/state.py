"""Loading the whole training state into an engine of any layout, and the counters that belong to it.

A rank asks for its own shards, and `StateReader` finds them in whatever layout they were written.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_taipan.checkpoint import folder
from megatron_taipan.checkpoint.identity import refuse_other_run
from megatron_taipan.checkpoint.progress import Progress
from megatron_taipan.checkpoint.reader import StateReader
from megatron_taipan.config import Config, load_config
from megatron_taipan.engine.protocol import Engine
from megatron_taipan.engine.state_shards import (
    KINDS,
    buffers,
    held_shards,
    set_optimizer_step,
    set_scaler_state,
    spread_masters,
)
from megatron_taipan.errors import UserError
from megatron_taipan.parallel.groups import Groups
from megatron_taipan.parameters import parameter_table


@dataclass(frozen=True)
class Loaded:
    """What does not live in the engine."""

    progress: Progress
    random: dict[str, Tensor]  # states of this rank's random number generators, see randomness.py
    config: Config | None = None  # the checkpoint's


def load(engine: Engine, path: Path, *, config: Config, identity: dict[str, Any], groups: Groups) -> Loaded:
    """Reads a checkpoint of any layout, whose files were verified, into the engine; collective.

    Args:
        identity: of this run; see checkpoint.identity.

    Raises:
        UserError: it is another run's. The same on every rank.
    """
    metadata = folder.read_metadata(path)
    refuse_other_run(str(path), metadata["identity"], identity)
    saved = load_config(path / folder.CONFIG)
    reader = StateReader(path, saved.model)
    table = parameter_table(config.model, config.parallel.tensor)
    shards = held_shards(engine, groups.zero_rank)
    tp = groups.tensor
    for kind in KINDS:
        for shard in shards:
            spec = table[shard.name]
            values = reader.elements(shard.name, kind, spec, tp.size, tp.rank, shard.start, shard.count)
            shard.tensor(kind).copy_(values)
    set_optimizer_step(shards, reader.optimizer_step)
    set_scaler_state(engine, reader.scaler)
    for name, value in buffers(engine.module):
        kept = reader.buffer(name)
        if kept.shape != value.shape:
            raise UserError(f"{path} is damaged: {name} has shape {list(kept.shape)}, not {list(value.shape)}")
        value.copy_(kept)
    spread_masters(engine)
    return Loaded(Progress(**metadata["progress"]), reader.random_states(dist.get_rank()), saved)
