"""Bytes and calls of the tensor-parallel collectives per step: counted, beside the formula.

    torchrun --nproc_per_node 2 -m benchmarks comm --config launch/configs/taipan_190m.yaml [a.b=c ...]

Runs one micro-batch forward and backward (float32, gloo or NCCL) with all processes in one tensor group, with and
without sequence parallelism. The formula is in megatron_taipan/parallel/traffic.py.
"""

import argparse
import os

import torch
import torch.distributed as dist

from megatron_taipan.config import load_config
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.ops.dispatch import pick_ops
from megatron_taipan.parallel.groups import build_groups
from megatron_taipan.parallel.mesh import Mesh
from megatron_taipan.parallel.traffic import Traffic, expected_traffic
from megatron_taipan.train.distributed import device_of_process, find_place, start_processes, stop_processes


def measure_traffic(
    model_config: ModelConfig, *, sequence: bool, batch: int, length: int, device: torch.device
) -> tuple[Traffic, Traffic]:
    """(counted, expected) of one micro-batch on all processes of the run; collective."""
    groups = build_groups(Mesh(tensor=dist.get_world_size()), sequence_parallel=sequence)
    model = Taipan(model_config, seed=0, tensor_parallel=groups.tensor, ops=pick_ops("reference")).to(device)
    tokens = torch.randint(0, model_config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(device)
    counter = groups.tensor.counter
    counter.reset()
    out = model(tokens, labels=tokens.roll(-1, 1))
    out.loss.backward()
    shares = model.layer_metrics.of_gates(model.named_metrics(out), "selected")
    selected = [round(share.item() * tokens.numel()) for share in shares]
    expected = expected_traffic(
        model_config, tensor=groups.tensor.size, sequence=sequence, batch=batch, length=length, selected=selected
    )
    return Traffic(counter.calls.copy(), counter.bytes.copy()), expected


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", type=int, default=1, help="rows of the micro-batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("overrides", nargs="*", help="a.b=c")


def run(args: argparse.Namespace) -> None:
    """Prints what was counted beside the formula on rank 0."""
    config = load_config(args.config, args.overrides)
    place = find_place(os.environ)
    device = device_of_process(place)
    start_processes(place, device, 600)
    for sequence in (False, True):
        counted, expected = measure_traffic(
            config.model, sequence=sequence, batch=args.batch, length=args.length, device=device
        )
        if place.rank == 0:
            layout = f"TP {place.world_size}" + (" + sequence parallelism" if sequence else "")
            print(f"{layout}, {args.batch} x {args.length} tokens")
            for name in sorted(counted.calls | expected.calls):
                print(
                    f"  {name:15s} {counted.calls[name]:6d} calls (formula {expected.calls[name]})"
                    f" {counted.bytes[name] / 2**20:10.3f} MiB (formula {expected.bytes[name] / 2**20:.3f})"
                )
    stop_processes()
