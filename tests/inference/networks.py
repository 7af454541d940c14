"""Small networks for tests of decoding, with weights large enough that every layer matters."""

import torch

from megatron_taipan.model.taipan import Taipan
from megatron_taipan.model_config import ModelConfig

VOCABULARY = 61


def small_config(pattern: str, **changes) -> ModelConfig:
    """A network of a few thousand parameters with a window and a scan chunk shorter than the tests' sequences."""
    tree = {
        "pattern": pattern,
        "vocab_size": VOCABULARY,
        "d_model": 24,
        "d_ff": 32,
        "init_std": 0.2,
        "mamba": {"d_state": 8, "headdim": 8, "n_groups": 2, "chunk_size": 5},
        "attention": {"n_heads": 4, "n_kv_heads": 2, "head_dim": 6, "window": 6},
    }
    return ModelConfig.model_validate(tree | changes)


def small_model(pattern: str, dtype: torch.dtype = torch.float64, **changes) -> Taipan:
    """In evaluation mode and, unless told, in float64, where equal mathematics means equal to 1e-10."""
    return Taipan(small_config(pattern, **changes), seed=1).to(dtype).eval()
