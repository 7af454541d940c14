"""`W` and `A`: attention of every query, through a sliding window or causal with rotary positions, then SwiGLU."""

from typing import TYPE_CHECKING

from megatron_taipan.layer_kinds.common import (
    ATTENTION_OPTIONS,
    attention_flops,
    attention_parameters,
    attention_pieces,
    attention_splits,
    check_attention,
    norm,
)
from megatron_taipan.layer_kinds.record import LayerKind
from megatron_taipan.param_spec import ParamSpec

if TYPE_CHECKING:
    from megatron_taipan.model_config import ModelConfig
    from megatron_taipan.parallel.context_traffic import PieceTraffic
    from megatron_taipan.parallel.traffic import LayerTraffic


def _plain_parameters(config: "ModelConfig", tensor: int) -> dict[str, ParamSpec]:
    return {"norm.weight": norm(config.d_model)} | attention_parameters(config, tensor)


def _check_rotary(config: "ModelConfig") -> None:
    check_attention(config)
    if config.head_dim % 2:
        raise ValueError(f"the rotary embedding of A layers needs an even head size, not {config.head_dim}")


def _plain_traffic(sent: "LayerTraffic") -> None:
    sent.norm()
    sent.into_block()
    sent.out_of_block()
    sent.mlp()


def _window_pieces(sent: "PieceTraffic") -> None:
    attention_pieces(sent, sent.config.attention.window)


def _full_pieces(sent: "PieceTraffic") -> None:
    attention_pieces(sent, None)


WINDOW_ATTENTION = LayerKind(
    letter="W", mixer="sliding-window attention", noun="layer", parameters=_plain_parameters,
    flops=lambda config, seq_len: attention_flops(config, seq_len, config.attention.window),
    check=check_attention, splits=attention_splits, traffic=_plain_traffic,
    pieces=_window_pieces,
    options=(*ATTENTION_OPTIONS, "attention.window"),
    residuals=2, attends=True, windowed=True, capturable=True, ends_graph=True,
)  # fmt: skip

FULL_ATTENTION = LayerKind(
    letter="A", mixer="full causal attention", noun="layer", parameters=_plain_parameters,
    flops=lambda config, seq_len: attention_flops(config, seq_len, None),
    check=_check_rotary, splits=attention_splits, traffic=_plain_traffic,
    pieces=_full_pieces,
    options=(*ATTENTION_OPTIONS, "attention.rope_theta"),
    residuals=2, attends=True, growing=True, capturable=True, ends_graph=True,
)  # fmt: skip
