"""What a run begins with: the training state of a checkpoint in an engine, or only weights in a new model.

Both in any layout. Of a state a rank asks for its own shards, and `StateReader` finds them in whatever layout they were
written; of weights (`checkpoint.init`) it takes its shard of every tensor, one tensor at a time.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taipan.checkpoint.folder import CONFIG
from megatron_taipan.checkpoint.metadata import Progress, network_settings, read_metadata, refuse_other_run
from megatron_taipan.checkpoint.reader import StateReader
from megatron_taipan.checkpoint.stages import refuse_edited_stages
from megatron_taipan.checkpoint.weights import CheckpointWeights, open_weights
from megatron_taipan.config import Config
from megatron_taipan.config_loading import load_config
from megatron_taipan.data.made_with import refuse_mixed
from megatron_taipan.engine.ema import begin_ema
from megatron_taipan.engine.protocol import Engine
from megatron_taipan.engine.state_shards import (
    EMA,
    KINDS,
    buffers,
    held_shards,
    set_optimizer_step,
    set_scaler_state,
    spread_masters,
)
from megatron_taipan.errors import UserError
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.parallel.groups import Groups
from megatron_taipan.parallel.tensor import TensorParallel
from megatron_taipan.parameters import parameter_table, take_shard


@dataclass(frozen=True)
class Loaded:
    """What does not live in the engine."""

    progress: Progress
    random: dict[str, Tensor]  # states of this rank's random number generators, see randomness.py
    config: Config | None = None  # the checkpoint's


def load_training_state(
    engine: Engine, path: Path, *, config: Config, identity: dict[str, Any], groups: Groups
) -> Loaded:
    """Reads a checkpoint of any layout, whose files were verified, into the engine; collective.

    Args:
        identity: of this run; see checkpoint/metadata.py.

    Raises:
        UserError: it is another run's. The same on every rank.
    """
    metadata = read_metadata(path)
    refuse_other_run(str(path), metadata["identity"], identity)
    saved = load_config(path / CONFIG)
    refuse_edited_stages(str(path), saved, config, metadata["progress"]["step"])
    if saved.optim.name == "muon" and config.optim.name != "muon":
        raise UserError(
            f"{path} was trained with optim.name=muon, which keeps no second moment of matrices, and"
            f" {config.optim.name} needs one; go on with optim.name=muon, or begin a run with the weights alone:"
            f" checkpoint.init={path}"
        )
    reader = StateReader(path, saved.model)
    table = parameter_table(config.model, config.parallel.tensor)
    shards = held_shards(engine, groups.zero_rank)
    tp = groups.tensor

    def load(kind: str) -> None:
        for shard in shards:
            if kind not in shard.kinds:
                continue
            spec = table[shard.name]
            values = reader.elements(shard.name, kind, spec, tp.size, tp.rank, shard.start, shard.count)
            shard.tensor(kind).copy_(values)

    for kind in KINDS:
        load(kind)
    if config.optim.ema_decay is not None:
        begin_ema(shards)  # as the weights are now, where the checkpoint keeps no average
        if reader.keeps(EMA):
            load(EMA)
    set_optimizer_step(shards, reader.optimizer_step)
    set_scaler_state(engine, reader.scaler)
    # one that was changed is meant for this run; the kept ones may be those of calibrated weights that it began with
    other_threshold = config.model.gate.threshold != saved.model.gate.threshold
    for name, value in buffers(engine.module):
        kept = reader.buffer(name)
        if kept.shape != value.shape:
            raise UserError(f"{path} is damaged: {name} has shape {list(kept.shape)}, not {list(value.shape)}")
        if not (other_threshold and name.endswith("gate.threshold")):
            value.copy_(kept)
    spread_masters(engine)
    return Loaded(Progress(**metadata["progress"]), reader.random_states(dist.get_rank()), saved)


class Network(Protocol):
    """What is asked of a model here (`megatron_taipan.model.taipan.Taipan`)."""

    config: ModelConfig
    tp: TensorParallel

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]: ...

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]: ...


@torch.no_grad()
def load_weights(
    model: Network, path: Path, config: ModelConfig | None = None, prefixes: Iterable[str] = ()
) -> list[str]:
    """Fills a model, or one tensor rank's or pipeline stage's part of it, with weights of any kind, tensor by tensor.

    Args:
        config: of the whole network; None: the model's own, which a stage does not have.
        prefixes: the data that the model is going to be trained on.

    Returns:
        Settings in which the weights' network computes something else than this model, as `name: X, this run Y`.

    Raises:
        UserError: the weights' network has other layers or sizes, or was trained on data of another tokenizer.
    """
    weights, config = open_weights(path), config or model.config
    if isinstance(weights, CheckpointWeights):
        refuse_mixed([*(source.prefix for source in weights.config.data.train), *prefixes])
    ours, theirs = parameter_table(config), parameter_table(weights.network)
    if config.letters != weights.network.letters:
        raise UserError(
            f"checkpoint.init={path} has the layers {weights.network.letters}, model.pattern gives"
            f" {config.letters}; convert with checkpoints.import_hf --config"
        )
    for name, spec in ours.items():
        if name not in theirs or theirs[name].shape != spec.shape:
            other = list(theirs[name].shape) if name in theirs else "absent"
            raise UserError(f"checkpoint.init={path}: {name} is {other}, this model's is {list(spec.shape)}")
    split = parameter_table(config, model.tp.size)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        full = weights.load(name)
        tensor.copy_(take_shard(full, split[name], model.tp.size, model.tp.rank) if name in split else full)
    before, now = (network_settings(network) for network in (weights.network, config))
    unlike = [name for name, value in before.items() if now.get(name) != value and name != "model.pattern"]
    # what decided about initial values decides no more
    return [
        f"{name}: {before[name]}, this run {now.get(name)}"
        for name in unlike
        if "init" not in name and name != "model.mup_base_width"
    ]
