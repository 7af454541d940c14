"""Anything that holds weights, opened: a checkpoint of any layout, an exported folder, a folder of weights.

None of these can execute code when it is read: tensors come from safetensors files, all else is JSON and plain YAML.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_taipan.checkpoint.identity import network_settings
from megatron_taipan.checkpoint.merge import TrainedState, open_state
from megatron_taipan.checkpoint.weights import Weights, open_weights
from megatron_taipan.config import ModelConfig
from megatron_taipan.data.made_with import refuse_mixed
from megatron_taipan.errors import UserError
from megatron_taipan.parallel.tensor import TensorParallel
from megatron_taipan.parameters import parameter_table, take_shard


def open_any(path: Path) -> Weights | TrainedState:
    """Opens a path by what lies in it.

    Raises:
        UserError: it holds no weights, or they are incomplete.
    """
    return open_weights(path) if (path / "config.json").is_file() else open_state(path)


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
    weights, config = open_any(path), config or model.config
    if isinstance(weights, TrainedState):
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
    return [f"{name}: {before[name]}, this run {now.get(name)}" for name in unlike if "init" not in name]
