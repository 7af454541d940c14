"""A tiny run: made-up but learnable text, a network of every kind of layer that trains fast. Bare weights."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from megatron_taipan.config import Config
from megatron_taipan.config_loading import make_config
from megatron_taipan.data.indexed import IndexedWriter

VOCAB = 64


def write_data(prefix: Path, documents: int = 300, seed: int = 0) -> str:
    """Documents of very different lengths that count upwards in threes, with noise; returns the prefix."""
    rng = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            length = int(rng.integers(3, 90))
            writer.add_document((rng.integers(0, 50) + 3 * np.arange(length) + rng.integers(0, 2, length)) % VOCAB)
    return str(prefix)


def toy_tree(prefix: str, directory: Path | str, **sections: dict[str, Any]) -> dict[str, Any]:
    """A configuration as a dictionary; `sections` are merged in, e.g. train={"steps": 3}."""
    tree: dict[str, Any] = {
        "name": "toy",
        "model": {
            "pattern": "M S M A", "vocab_size": VOCAB, "d_model": 32, "d_ff": 48,
            "mamba": {"d_state": 16, "headdim": 16, "chunk_size": 16}, "attention": {"n_heads": 2, "window": 12},
        },
        "parallel": {"zero_stage": 1, "timeout_s": 60},
        "data": {"train": prefix, "seq_len": 32},
        "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 2},
        "train": {
            "steps": 6, "global_batch": 8, "micro_batch": 2, "precision": "fp32", "eval_every": 0, "eval_samples": 6,
        },
        "checkpoint": {"dir": str(directory), "save_every": 0},
        "log": {"every": 1, "tensorboard": False},
    }  # fmt: skip
    for name, options in sections.items():
        tree[name] = tree.get(name, {}) | options
    return tree


class Ones(nn.Module):
    """Parameters of these shapes, all 1; those named in `low` are bf16, the others float32."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], low: set[str]):
        super().__init__()
        for name, shape in shapes.items():
            dtype = torch.bfloat16 if name in low else torch.float32
            self.register_parameter(name, nn.Parameter(torch.ones(shape, dtype=dtype)))


def toy_config(prefix: str, directory: Path | str = "unused", **sections: dict[str, Any]) -> Config:
    return make_config(toy_tree(prefix, directory, **sections))
