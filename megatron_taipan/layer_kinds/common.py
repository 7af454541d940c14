"""Parameters, operations and checks that several kinds of layers share."""

from typing import TYPE_CHECKING

from megatron_taipan.errors import divisors
from megatron_taipan.layer_kinds.record import Split
from megatron_taipan.param_spec import ParamSpec

if TYPE_CHECKING:
    from megatron_taipan.model_config import ModelConfig
    from megatron_taipan.parallel.context_traffic import PieceTraffic


def norm(size: int) -> ParamSpec:
    """The weight of an RMSNorm of the residual stream."""
    return ParamSpec((size,), "ones", decay=False, on_stream=True)


def attention_parameters(config: "ModelConfig", tensor: int) -> dict[str, ParamSpec]:
    """Attention, then SwiGLU after its own norm; without the norm before attention."""
    d, size, kv, f = config.d_model, config.head_dim, config.n_kv_heads, config.d_ff
    whole = {"split": 0} if kv % tensor == 0 else {"summed": True}
    return {
        "attention.q_proj": ParamSpec((config.attention.n_heads * size, d), "normal", split=0),
        "attention.k_proj": ParamSpec((kv * size, d), "normal", **whole),
        "attention.v_proj": ParamSpec((kv * size, d), "normal", **whole),
        "attention.out_proj": ParamSpec((d, config.attention.n_heads * size), "normal_residual", split=1),
        "mlp_norm.weight": norm(d),
        "mlp.gate_proj": ParamSpec((f, d), "normal", split=0),
        "mlp.up_proj": ParamSpec((f, d), "normal", split=0),
        "mlp.down_proj": ParamSpec((d, f), "normal_residual", split=1),
    }


def attention_flops(config: "ModelConfig", seq_len: int, window: int | None, share: float = 1.0) -> float:
    """Attention over the visible keys and SwiGLU, per token.

    Args:
        window: tokens that a query sees at most; None: all before it.
        share: of the tokens whose queries are computed.
    """
    d = config.d_model
    queries, keys = config.attention.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    window = min(window or seq_len, seq_len)
    # Token i sees min(i + 1, window) keys; the mean over the sequence:
    visible = (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
    return share * (4 * d * queries + 4 * queries * visible) + 4 * d * keys + 6 * d * config.d_ff


def attention_pieces(sent: "PieceTraffic", window: int | None) -> None:
    """Keys and values of earlier pieces, as far back as a window of so many tokens reaches (None: all of them)."""
    config = sent.config
    kv_heads = config.n_kv_heads // sent.tensor if config.n_kv_heads % sent.tensor == 0 else 1
    sent.tokens_before(2 * kv_heads * config.head_dim, window)


def check_attention(config: "ModelConfig") -> None:
    """Whether heads fit the width.

    Raises:
        ValueError: with the numbers and what fits.
    """
    a = config.attention
    if a.head_dim is None and config.d_model % a.n_heads:
        raise ValueError(
            f"attention.n_heads={a.n_heads} does not divide d_model={config.d_model}"
            f" ({config.d_model} % {a.n_heads} = {config.d_model % a.n_heads}); choose {divisors(config.d_model)}"
        )
    if a.n_heads % config.n_kv_heads:
        raise ValueError(
            f"attention.n_kv_heads={config.n_kv_heads} does not divide n_heads={a.n_heads}"
            f" ({a.n_heads} % {config.n_kv_heads} = {a.n_heads % config.n_kv_heads}); choose {divisors(a.n_heads)}"
        )


def attention_splits(config: "ModelConfig") -> tuple[Split, ...]:
    """Heads, key-value heads and the width of SwiGLU."""
    return (
        Split("model.attention.n_heads", config.attention.n_heads),
        Split("model.attention.n_kv_heads", config.n_kv_heads, shared=True),
        Split("model.d_ff", config.d_ff),
    )


ATTENTION_OPTIONS = ("d_ff", "attention.n_heads", "n_kv_heads", "head_dim")
