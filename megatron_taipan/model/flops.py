"""Floating-point operations of a forward pass, per token: what every MFU of the project is computed from.

A product of m x k and k x n counts 2 m k n. Counted is what the definition needs, not what a kernel spends: the SSD
scan as its recurrence (update and read of the state), attention over visible keys only, selective attention at the
capacity C. A training step costs three times the forward pass.
"""

import math

from megatron_taipan.config import ModelConfig
from megatron_taipan.parallel.layout import describe
from megatron_taipan.parallel.stages import stage_bounds


def layer_params(config: ModelConfig, index: int) -> int:
    """Parameters of layer `index`, over all tensor ranks."""
    prefix = f"layers.{index}."
    return sum(math.prod(spec.shape) for name, spec in describe(config).items() if name.startswith(prefix))


def model_params(config: ModelConfig) -> int:
    """Parameters of the whole network, over all tensor ranks, shared ones once."""
    return sum(math.prod(spec.shape) for spec in describe(config).values())


def layer_flops(config: ModelConfig, letter: str, seq_len: int) -> float:
    """Forward operations per token of one layer.

    Args:
        letter: the layer's letter in the pattern; seq_len: tokens of a document, for the mean number of visible keys.
    """
    return _mamba(config) if letter == "M" else _attention(config, letter, seq_len)


def head_flops(config: ModelConfig) -> float:
    """Forward operations per token of the logits."""
    return 2.0 * config.d_model * config.vocab_size


def model_flops(config: ModelConfig, seq_len: int) -> float:
    """Forward operations per token of the whole network."""
    return sum(layer_flops(config, letter, seq_len) for letter in config.letters) + head_flops(config)


def _mamba(config: ModelConfig) -> float:
    m, d, inner = config.mamba, config.d_model, config.d_inner
    states = m.n_groups * m.d_state
    projections = 2 * d * (2 * inner + 2 * states + config.mamba_heads) + 2 * inner * d
    convolution = 2 * m.d_conv * (inner + 2 * states)
    # Per channel: s <- decay s + (dt x) B is 3 operations a state, y = s C is 2; then D x.
    scan = inner * (5 * m.d_state + 2)
    return float(projections + convolution + scan)


def _attention(config: ModelConfig, letter: str, seq_len: int) -> float:
    d = config.d_model
    queries, keys = config.attention.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    share = config.gate.final_capacity if letter == "S" else 1.0  # tokens whose queries are computed
    window = seq_len if letter == "A" else min(config.attention.window, seq_len)
    # Token i sees min(i + 1, window) keys; the mean over the sequence:
    visible = (window * (window + 1) / 2 + (seq_len - window) * window) / seq_len
    attention = share * (4 * d * queries + 4 * queries * visible) + 4 * d * keys
    gate = 4 * d if letter == "S" else 0
    return attention + gate + 6 * d * config.d_ff


def pipeline_bounds(config: ModelConfig, seq_len: int, stages: int) -> list[int]:
    """First layer of each pipeline stage and the number of layers; the head counts with the last layer.

    Raises:
        UserError: the pattern's cuts do not make that many stages, or it has fewer layers.
    """
    costs = [layer_flops(config, letter, seq_len) for letter in config.letters]
    costs[-1] += head_flops(config)
    return stage_bounds(costs, config.cuts, stages)
