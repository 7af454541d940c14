"""`M`: the Mamba-2 block (arXiv 2405.21060).

Its fused in_proj is stored as its components z, x, B, C and dt (and the convolution as x, B, C): each is then either
split by heads or groups, or replicated, and no rule about offsets inside a fused matrix is needed.
"""

from typing import TYPE_CHECKING

from megatron_taipan.errors import divisors
from megatron_taipan.layer_kinds.common import norm
from megatron_taipan.layer_kinds.record import LayerKind, Split
from megatron_taipan.param_spec import ParamSpec

if TYPE_CHECKING:
    from megatron_taipan.model_config import ModelConfig
    from megatron_taipan.parallel.context_traffic import PieceTraffic
    from megatron_taipan.parallel.traffic import LayerTraffic


def _mamba2_parameters(config: "ModelConfig", tensor: int) -> dict[str, ParamSpec]:
    m, d, inner, heads = config.mamba, config.d_model, config.d_inner, config.mamba_heads
    states = m.n_groups * m.d_state
    whole = {"split": 0} if m.n_groups % tensor == 0 else {"summed": True}  # B and C: by groups, or on every rank
    table = {
        "in_proj_z": ParamSpec((inner, d), "linear", split=0),
        "in_proj_x": ParamSpec((inner, d), "linear", split=0),
        "in_proj_B": ParamSpec((states, d), "linear", **whole),
        "in_proj_C": ParamSpec((states, d), "linear", **whole),
        "in_proj_dt": ParamSpec((heads, d), "linear", split=0),
        "conv_x_weight": ParamSpec((inner, m.d_conv), "linear", split=0, elementwise=True),
        "conv_B_weight": ParamSpec((states, m.d_conv), "linear", elementwise=True, **whole),
        "conv_C_weight": ParamSpec((states, m.d_conv), "linear", elementwise=True, **whole),
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
    return {"norm.weight": norm(d)} | {f"mixer.{name}": spec for name, spec in table.items()}


def _mamba2_flops(config: "ModelConfig", seq_len: int) -> float:
    m, d, inner = config.mamba, config.d_model, config.d_inner
    states = m.n_groups * m.d_state
    projections = 2 * d * (2 * inner + 2 * states + config.mamba_heads) + 2 * inner * d
    convolution = 2 * m.d_conv * (inner + 2 * states)
    # Per channel: s <- decay s + (dt x) B is 3 operations a state, y = s C is 2; then D x.
    scan = inner * (5 * m.d_state + 2)
    return float(projections + convolution + scan)


def _mamba2_check(config: "ModelConfig") -> None:
    m = config.mamba
    if config.d_inner % m.headdim:
        raise ValueError(
            f"mamba.headdim={m.headdim} does not divide d_inner = expand * d_model ="
            f" {m.expand} * {config.d_model} = {config.d_inner} (remainder {config.d_inner % m.headdim})"
        )
    if config.mamba_heads % m.n_groups:
        raise ValueError(
            f"mamba.n_groups={m.n_groups} does not divide the {config.mamba_heads} SSM heads"
            f" (d_inner / headdim = {config.d_inner} / {m.headdim}); choose {divisors(config.mamba_heads)}"
        )


def _mamba2_splits(config: "ModelConfig") -> tuple[Split, ...]:
    return (
        Split("the number of SSM heads", config.mamba_heads),
        Split("model.mamba.n_groups", config.mamba.n_groups, shared=True),
    )


def _mamba2_traffic(sent: "LayerTraffic") -> None:
    sent.norm()
    sent.into_block()
    groups = sent.config.mamba.n_groups
    if groups < sent.tensor:  # the norm's sums of squares, forward and backward
        sent.all_reduce(4 * sent.tokens * groups, calls=2)
    sent.input_for_weights()
    sent.out_of_block()


def _mamba2_pieces(sent: "PieceTraffic") -> None:
    config, m = sent.config, sent.config.mamba
    groups = m.n_groups // sent.tensor if m.n_groups % sent.tensor == 0 else 1
    sent.tokens_before(config.d_inner // sent.tensor + 2 * groups * m.d_state, m.d_conv)
    sent.entering_state(config.mamba_heads // sent.tensor, m.headdim * m.d_state)


MAMBA2 = LayerKind(
    letter="M", mixer="Mamba-2", noun="block", parameters=_mamba2_parameters, flops=_mamba2_flops,
    check=_mamba2_check, splits=_mamba2_splits, traffic=_mamba2_traffic, pieces=_mamba2_pieces, capturable=True,
    options=tuple(f"mamba.{name}" for name in ("d_state", "headdim", "expand", "n_groups", "d_conv", "conv_bias")),
)  # fmt: skip
