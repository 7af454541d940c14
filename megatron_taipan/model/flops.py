"""Floating-point operations of a forward pass, per token: what every MFU of the project is computed from.

A product of m x k and k x n counts 2 m k n. Counted is what the definition needs, not what a kernel spends: the SSD
scan as its recurrence (update and read of the state), attention over visible keys only, selective attention at the
capacity C. A training step costs three times the forward pass.
"""

import math

from megatron_taipan.layer_kinds.registry import kind_of
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.parallel.stages import stage_bounds
from megatron_taipan.parameters import parameter_table


def layer_params(config: ModelConfig, index: int) -> int:
    """Parameters of layer `index`, over all tensor ranks."""
    return sum(math.prod(spec.shape) for spec in kind_of(config.letters[index]).parameters(config, 1).values())


def model_params(config: ModelConfig) -> int:
    """Parameters of the whole network, over all tensor ranks, shared ones once."""
    return sum(math.prod(spec.shape) for spec in parameter_table(config).values())


def layer_flops(config: ModelConfig, letter: str, seq_len: int) -> float:
    """Forward operations per token of one layer.

    Args:
        letter: the layer's letter in the pattern; seq_len: tokens of a document, for the mean number of visible keys.
    """
    return kind_of(letter).flops(config, seq_len)


def head_flops(config: ModelConfig) -> float:
    """Forward operations per token of the logits."""
    return 2.0 * config.d_model * config.vocab_size


def model_flops(config: ModelConfig, seq_len: int) -> float:
    """Forward operations per token of the whole network."""
    return sum(layer_flops(config, letter, seq_len) for letter in config.letters) + head_flops(config)


def pipeline_bounds(config: ModelConfig, seq_len: int, stages: int) -> list[int]:
    """First layer of each pipeline stage and the number of layers; the head counts with the last layer.

    Raises:
        UserError: the pattern's cuts do not make that many stages, or it has fewer layers.
    """
    costs = [layer_flops(config, letter, seq_len) for letter in config.letters]
    costs[-1] += head_flops(config)
    return stage_bounds(costs, config.cuts, stages)
