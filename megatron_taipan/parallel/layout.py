"""One table describes every parameter: shape, split over tensor ranks, weight decay, float32, initial value.

Initialisation, splitting, merging, resharding, weight-decay groups, float32 islands and exports are all read from
it. A parameter that the table does not know is an error, never a default.

Mamba-2's fused in_proj is stored as its components z, x, B, C and dt (and the convolution as x, B, C): each is then
either split by heads or groups, or replicated, and no rule about offsets inside a fused matrix is needed.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from megatron_taipan.config import ModelConfig, divisors
from megatron_taipan.errors import UserError


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of the whole (unsplit) model."""

    shape: tuple[int, ...]
    init: str  # which rule of model/init.py gives its first value
    split: int | None = None  # dimension split over tensor ranks; None: every rank holds all of it
    padded: bool = False  # the split dimension is filled up with zero rows to a multiple of the ranks
    decay: bool = True  # takes weight decay
    float32: bool = False  # stays float32 under bf16 and fp16
    summed: bool = False  # replicated, but each rank's gradient covers only its own heads' use of it
    on_stream: bool = False  # replicated; where tokens are sharded, each rank's gradient covers its own tokens only

    def local_shape(self, size: int) -> tuple[int, ...]:
        """The shape on one of `size` tensor ranks."""
        if self.split is None:
            return self.shape
        shape = list(self.shape)
        shape[self.split] = -(-shape[self.split] // size)
        return tuple(shape)


def describe(config: ModelConfig, tensor: int = 1) -> dict[str, ParamSpec]:
    """The table: every parameter's full name and description, in the order of the network.

    Args:
        tensor: number of tensor ranks; B, C, k and v are split where it divides their groups or heads, and
            replicated where it is a multiple of them.

    Raises:
        UserError: `tensor` does not fit the heads, groups or widths.
    """
    check_tensor_size(config, tensor)
    d = config.d_model
    table = {"embedding.weight": ParamSpec((config.vocab_size, d), "normal", split=0, padded=True)}
    for index, letter in enumerate(config.letters):
        layer = {"norm.weight": _norm(d)}
        if letter == "M":
            layer |= _mamba(config, tensor)
        else:
            if letter == "S":
                layer["gate.weight"] = ParamSpec((2, d), "normal", float32=True, on_stream=True)
                layer["gate.bias"] = ParamSpec((2,), "gate_bias", decay=False, float32=True, on_stream=True)
            layer |= _attention(config, tensor) | {"mlp_norm.weight": _norm(d)} | _mlp(config)
        table |= {f"layers.{index}.{name}": spec for name, spec in layer.items()}
    table["final_norm.weight"] = _norm(d)
    if not config.tie_embeddings:
        table["head.weight"] = ParamSpec((config.vocab_size, d), "normal", split=0, padded=True)
    return table


def _norm(size: int) -> ParamSpec:
    return ParamSpec((size,), "ones", decay=False, on_stream=True)


def _mamba(config: ModelConfig, tensor: int) -> dict[str, ParamSpec]:
    m, d, inner, heads = config.mamba, config.d_model, config.d_inner, config.mamba_heads
    states = m.n_groups * m.d_state
    whole = {"split": 0} if m.n_groups % tensor == 0 else {"summed": True}  # B and C: by groups, or on every rank
    table = {
        "in_proj_z": ParamSpec((inner, d), "linear", split=0),
        "in_proj_x": ParamSpec((inner, d), "linear", split=0),
        "in_proj_B": ParamSpec((states, d), "linear", **whole),
        "in_proj_C": ParamSpec((states, d), "linear", **whole),
        "in_proj_dt": ParamSpec((heads, d), "linear", split=0),
        "conv_x_weight": ParamSpec((inner, m.d_conv), "linear", split=0),
        "conv_B_weight": ParamSpec((states, m.d_conv), "linear", **whole),
        "conv_C_weight": ParamSpec((states, m.d_conv), "linear", **whole),
    }
    if m.conv_bias:
        table |= {
            "conv_x_bias": ParamSpec((inner,), "conv_bias", split=0, decay=False),
            "conv_B_bias": ParamSpec((states,), "conv_bias", decay=False, **whole),
            "conv_C_bias": ParamSpec((states,), "conv_bias", decay=False, **whole),
        }
    table |= {
        "dt_bias": ParamSpec((heads,), "dt_bias", split=0, decay=False, float32=True),
        "A_log": ParamSpec((heads,), "A_log", split=0, decay=False, float32=True),
        "D": ParamSpec((heads,), "ones", split=0, decay=False, float32=True),
        "norm_weight": ParamSpec((inner,), "ones", split=0, decay=False),
        "out_proj": ParamSpec((d, inner), "linear_residual", split=1),
    }
    return {f"mixer.{name}": spec for name, spec in table.items()}


def _attention(config: ModelConfig, tensor: int) -> dict[str, ParamSpec]:
    d, size, kv = config.d_model, config.head_dim, config.n_kv_heads
    whole = {"split": 0} if kv % tensor == 0 else {"summed": True}
    return {
        "attention.q_proj": ParamSpec((config.attention.n_heads * size, d), "normal", split=0),
        "attention.k_proj": ParamSpec((kv * size, d), "normal", **whole),
        "attention.v_proj": ParamSpec((kv * size, d), "normal", **whole),
        "attention.out_proj": ParamSpec((d, config.attention.n_heads * size), "normal_residual", split=1),
    }


def _mlp(config: ModelConfig) -> dict[str, ParamSpec]:
    d, f = config.d_model, config.d_ff
    return {
        "mlp.gate_proj": ParamSpec((f, d), "normal", split=0),
        "mlp.up_proj": ParamSpec((f, d), "normal", split=0),
        "mlp.down_proj": ParamSpec((d, f), "normal_residual", split=1),
    }


def check_tensor_size(config: ModelConfig, tensor: int) -> None:
    """Whether the network can be split over `tensor` ranks.

    Raises:
        UserError: with the numbers and the sizes that do fit.
    """

    def needs(what: str, count: int) -> None:
        if count % tensor:
            raise UserError(
                f"parallel.tensor={tensor} does not divide {what}={count} ({count} % {tensor} = {count % tensor});"
                f" choose {divisors(count)}"
            )

    def shared(what: str, count: int) -> None:
        if count % tensor and tensor % count:
            raise UserError(
                f"parallel.tensor={tensor} and {what}={count}: one must divide the other, so that a tensor rank's"
                f" heads share whole groups; choose {divisors(count)} or a multiple of {count}"
            )

    if "M" in config.letters:
        needs("the number of SSM heads", config.mamba_heads)
        shared("model.mamba.n_groups", config.mamba.n_groups)
    if set(config.letters) & set("SWA"):
        needs("model.attention.n_heads", config.attention.n_heads)
        shared("model.attention.n_kv_heads", config.n_kv_heads)
        needs("model.d_ff", config.d_ff)


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
