"""Initial values: one rule a kind, a pure function of (seed, parameter name).

The full tensor is drawn and then sliced, so that the values depend neither on the layout nor on the order in which
modules are built. Sources: mamba_ssm's Mamba2 for the Mamba-2 parameters, GPT-2's scaled residual projections.
"""

import hashlib
import math

import torch
from torch import Tensor

from megatron_taipan.layer_kinds.registry import kind_of
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.param_spec import ParamSpec


def initial_value(name: str, spec: ParamSpec, config: ModelConfig, seed: int) -> Tensor:
    """The full float32 tensor of a parameter, on the CPU."""
    m = config.mamba
    generator = torch.Generator().manual_seed(_seed_of(name, seed))

    def uniform(low: float, high: float) -> Tensor:
        return torch.empty(spec.shape).uniform_(low, high, generator=generator)

    def normal(std: float) -> Tensor:
        return torch.empty(spec.shape).normal_(0.0, std, generator=generator)

    with torch.device("cpu"):  # whatever the default device is
        # Every projection back into the residual stream is scaled down by the square root of their number.
        residual = 1.0 / math.sqrt(sum(kind_of(letter).residuals for letter in config.letters))
        # muP (arXiv 2203.03466, table 8): what sums over the width, by the root of the width; "linear" is so anyway.
        narrowed = 1.0 / math.sqrt(config.times_as_wide) if spec.is_matrix or spec.wide else 1.0
        match spec.init:
            case "zeros":
                return torch.zeros(spec.shape)
            case "gate_bias":  # s_0 = 0, s_1 = init_bias
                return torch.tensor([0.0, config.gate.init_bias])
            case "ones":
                return torch.ones(spec.shape)
            case "to_head":  # the sums of the head grow with the width
                return torch.full(spec.shape, 1.0 / config.times_as_wide)
            case "normal":
                return normal(config.init_std * narrowed)
            case "normal_residual":
                return normal(config.init_std * residual * narrowed)
            case "linear":  # torch's default of a linear layer: U(-1/sqrt(fan_in), 1/sqrt(fan_in))
                return uniform(-1.0, 1.0) / math.sqrt(spec.shape[1])
            case "linear_residual":
                return uniform(-1.0, 1.0) * (residual / math.sqrt(spec.shape[1]))
            case "conv_bias":
                return uniform(-1.0, 1.0) / math.sqrt(m.d_conv)
            case "A_log":
                return uniform(*m.a_init).log()
            case "dt_bias":  # softplus(dt_bias) is log-uniform in dt_init
                low, high = (math.log(v) for v in m.dt_init)
                dt = uniform(low, high).exp().clamp(min=m.dt_init_floor)
                return dt + torch.log(-torch.expm1(-dt))  # inverse of softplus
    raise ValueError(f"parameter {name}: unknown initialisation {spec.init!r}")


def _seed_of(name: str, seed: int) -> int:
    """63 bits from (seed, name)."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
