"""How far do runs drift apart that differ only by rounding? A deep network learns one batch of random tokens.

    torchrun --nproc_per_node N -m experiments.rounding [--precision fp32] [--perturb 1e-3]

N processes are one tensor-parallel group; 35 layers `(M*6 S)*5`, reference operations, 11 steps. Prints their losses.
docs/performance.md, under several GPUs, says what the figures are for.
"""

import argparse
import os

import torch

from benchmarks.common import join_processes
from benchmarks.step import random_batch, select_capacity
from megatron_taipan.config import Config
from megatron_taipan.config_loading import make_config
from megatron_taipan.engine.build import build_engine
from megatron_taipan.ops.dispatch import pick_ops
from megatron_taipan.parallel.processes import find_place, stop_processes
from megatron_taipan.train.start import build_training_model
from megatron_taipan.train.step import train_step

STEPS = 11


def configure(tensor: int, precision: str) -> Config:
    """A network as deep as the 1.3B preset, small in everything else."""
    return make_config({
        "model": {
            "pattern": "(M*6 S)*5", "vocab_size": 8000, "d_model": 128, "d_ff": 256,
            "mamba": {"d_state": 16, "headdim": 16}, "attention": {"n_heads": 4, "window": 64},
        },
        "parallel": {"tensor": tensor, "sequence": False, "zero_stage": 1},
        "data": {"train": "unused", "seq_len": 128},
        "optim": {"lr": 8e-3, "betas": [0.9, 0.95], "grad_clip": 1.0},
        "train": {"steps": STEPS, "global_batch": 2, "micro_batch": 2, "precision": precision},
        "checkpoint": {"dir": "unused"},
    })  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--perturb", type=float, default=0.0, help="relative noise on every initial weight")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    config = configure(find_place(os.environ).world_size, options.precision)
    device, groups = join_processes(config)
    model = build_training_model(config, groups, pick_ops("reference"))
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        parameter.data.mul_(1 + options.perturb * torch.randn(parameter.shape, generator=generator))
    select_capacity(model, config)
    engine = build_engine(model, config, groups, device)
    torch.manual_seed(0)  # every rank sees the same tokens
    batch = random_batch(config, device)
    losses = [train_step(engine, [batch], step=k, groups=groups, grad_clip=1.0).loss for k in range(STEPS)]
    if groups.tensor.rank == 0:
        print(f"tensor {groups.tensor.size}, {options}:", *[f"{loss:.3f}" for loss in losses], flush=True)
    stop_processes()


if __name__ == "__main__":
    main()
