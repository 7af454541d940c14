"""`S`: selective attention; a gate picks the tokens that attend (arXiv 2410.18572)."""

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

# What a gate measures: the share of tokens selected, that above the threshold of evaluation, the means of alpha and of
# its entropy in nats, and its budget loss (model/gate.py).
GATE_METRICS = ("selected", "selected_eval", "alpha", "entropy", "budget")


def _selective_parameters(config: "ModelConfig", tensor: int) -> dict[str, ParamSpec]:
    d = config.d_model
    return {
        "norm.weight": norm(d),
        "gate.weight": ParamSpec((2, d), "normal", float32=True, on_stream=True, elementwise=True, wide=True),
        "gate.bias": ParamSpec((2,), "gate_bias", decay=False, float32=True, on_stream=True),
        **attention_parameters(config, tensor),
    }


def _selective_flops(config: "ModelConfig", seq_len: int) -> float:
    """With the share C of the queries, as at the end of training, and the gate."""
    share = config.gate.final_capacity
    return attention_flops(config, seq_len, config.attention.window, share) + 4 * config.d_model


def _selective_traffic(sent: "LayerTraffic") -> None:
    d = sent.config.d_model
    sent.norm()
    sent.into_block()
    if sent.sequence:
        sent.all_reduce(4 * (2 * d + 2))  # gradients of the gate
        sent.all_reduce(4 * sent.batch)  # selected fraction of each row
        sent.all_gather(sent.tokens)  # which tokens
        sent.all_reduce(4 * 4)  # statistics
        sent.out_of_block()
    else:
        computed = sent.tokens if sent.config.gate.gradient == "all" else sent.next_selected()
        sent.all_reduce(computed * d * sent.width)  # the computed rows only
    sent.mlp()


def _selective_pieces(sent: "PieceTraffic") -> None:
    sent.share_of_rows(learned=sent.config.gate.noise != "random")
    attention_pieces(sent, sent.config.attention.window)


SELECTIVE_ATTENTION = LayerKind(
    letter="S", mixer="selective attention", noun="layer", parameters=_selective_parameters, flops=_selective_flops,
    check=check_attention, splits=attention_splits, traffic=_selective_traffic,
    pieces=_selective_pieces,
    # the gate's other options are of training
    options=(*ATTENTION_OPTIONS, "attention.window", "gate.refinement", "gate.weight"),
    metrics=GATE_METRICS,
    residuals=2, attends=True, windowed=True, gated=True, capturable=True, ends_graph=True,
)  # fmt: skip
