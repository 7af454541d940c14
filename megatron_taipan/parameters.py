"""One table describes every parameter: shape, split over tensor ranks, weight decay, float32, initial value.

Initialisation, splitting, merging, resharding, weight-decay groups, float32 parameters and exports are all read from
it. A parameter that the table does not know is an error, never a default. What a layer's parameters are says its kind
(layer_kinds/).
"""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from megatron_taipan.errors import UserError, divisors
from megatron_taipan.layer_kinds.common import norm
from megatron_taipan.layer_kinds.registry import kind_of, kinds_of
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.param_spec import ParamSpec


def parameter_table(config: ModelConfig, tensor: int = 1) -> dict[str, ParamSpec]:
    """The table: every parameter's full name and description, in the order of the network.

    Args:
        tensor: number of tensor ranks; B, C, k and v are split where it divides their groups or heads, and
            replicated where it is a multiple of them.

    Raises:
        UserError: `tensor` does not fit the heads, groups or widths.
    """
    check_tensor_size(config, tensor)
    d = config.d_model
    tokens = ParamSpec((config.vocab_size, d), "normal", split=0, padded=True, elementwise=True)
    table = {"embedding.weight": tokens}
    for index, letter in enumerate(config.letters):
        layer = kind_of(letter).parameters(config, tensor)
        table |= {f"layers.{index}.{name}": spec for name, spec in layer.items()}
    table["final_norm.weight"] = replace(norm(d), init="to_head", wide=True)
    if not config.tie_embeddings:
        table["head.weight"] = tokens
    return table


def check_tensor_size(config: ModelConfig, tensor: int) -> None:
    """Whether the network can be split over `tensor` ranks.

    Raises:
        UserError: with the numbers and the sizes that do fit.
    """
    for what, count, shared in (split for kind in kinds_of(config.letters) for split in kind.splits(config)):
        if count % tensor == 0 or (shared and tensor % count == 0):
            continue
        if shared:
            raise UserError(
                f"parallel.tensor={tensor} and {what}={count}: one must divide the other, so that a tensor rank's"
                f" heads share whole groups; choose {divisors(count)} or a multiple of {count}"
            )
        raise UserError(
            f"parallel.tensor={tensor} does not divide {what}={count} ({count} % {tensor} = {count % tensor});"
            f" choose {divisors(count)}"
        )


def take_shard(full: Tensor, spec: ParamSpec, size: int, rank: int) -> Tensor:
    """Rank `rank`'s part (of `size`) of a full tensor, a copy; padding rows are zero."""
    if spec.split is None or size == 1:
        return full.clone()
    count = spec.local_shape(size)[spec.split]
    start = min(rank * count, full.shape[spec.split])
    part = full.narrow(spec.split, start, min(count, full.shape[spec.split] - start))
    missing = count - part.shape[spec.split]
    if missing:
        padding = [0, 0] * (full.dim() - 1 - spec.split) + [0, missing]
        part = F.pad(part, padding)
    return part.clone()


def put_shard(full: Tensor, shard: Tensor, spec: ParamSpec, rank: int) -> None:
    """Copies tensor rank `rank`'s part into its place in the full tensor; padding is left out."""
    if spec.split is None:
        full.copy_(shard)
        return
    count = shard.shape[spec.split]
    start = min(rank * count, full.shape[spec.split])
    kept = min(count, full.shape[spec.split] - start)
    full.narrow(spec.split, start, kept).copy_(shard.narrow(spec.split, 0, kept))


def merge_shards(shards: list[Tensor], spec: ParamSpec) -> Tensor:
    """The full tensor from the shards of all tensor ranks, in rank order; the inverse of `take_shard`."""
    if spec.split is None:
        return shards[0].clone()
    full = shards[0].new_empty(spec.shape)
    for rank, shard in enumerate(shards):
        put_shard(full, shard, spec, rank)
    return full
