"""Bytes and calls of the collectives of tensor or context parallelism per step: counted, beside the formula.

    torchrun --nproc_per_node 2 -m benchmarks comm --config launch/configs/taipan_190m.yaml [a.b=c ...]
    torchrun --nproc_per_node 2 -m benchmarks comm --config launch/configs/taipan_190m.yaml parallel.context=2 [...]

Runs one micro-batch forward and backward (float32, gloo or NCCL) with all processes in one tensor group, with and
without sequence parallelism. With `parallel.context` above 1 that many ranks hold pieces of each row, the others are
for `parallel.tensor`, and counted is what each rank sends to those with the other pieces. The formulas are in
megatron_taipan/parallel/traffic.py and context_traffic.py.
"""

import argparse
import os

import torch
import torch.distributed as dist

from megatron_taipan.config_loading import load_config
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.ops.dispatch import pick_ops
from megatron_taipan.parallel.all_ranks import gather_objects
from megatron_taipan.parallel.context_traffic import expected_piece_traffic
from megatron_taipan.parallel.groups import build_groups
from megatron_taipan.parallel.mesh import Mesh
from megatron_taipan.parallel.processes import device_of_process, find_place, stop_processes
from megatron_taipan.parallel.traffic import Traffic, expected_traffic
from megatron_taipan.train.distributed import start_processes


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


def measure_piece_traffic(
    model_config: ModelConfig,
    *,
    context: int,
    batch: int,
    length: int,
    device: torch.device,
    sequence: bool = False,
    recompute: str = "none",
) -> tuple[Traffic, Traffic]:
    """(counted, expected) of what this rank sends to other pieces in one micro-batch; collective.

    Args:
        length: tokens of a whole row; `context` ranks hold a piece each, and the tensor groups fill the run.
    """
    groups = build_groups(Mesh(context=context, tensor=dist.get_world_size() // context), sequence_parallel=sequence)
    place, tp = groups.context, groups.tensor
    assert place is not None
    model = Taipan(
        model_config, seed=0, tensor_parallel=tp, context_parallel=place, ops=pick_ops("reference"),
        recompute=recompute,
    ).to(device)  # fmt: skip
    tokens = torch.randint(0, model_config.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0))
    inputs, labels = (t.chunk(context, 1)[place.rank].to(device) for t in (tokens[:, :-1], tokens[:, 1:]))
    place.counter.reset()
    start = torch.zeros(batch, dtype=torch.int64, device=device)
    model(inputs, labels=labels, document_start=start).loss.backward()
    expected = expected_piece_traffic(
        model_config, context=context, rank=place.rank, batch=batch, length=length, tensor=tp.size,
        recompute=recompute != "none",
    )  # fmt: skip
    return Traffic(place.counter.calls.copy(), place.counter.bytes.copy()), expected


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    parser.add_argument("--config", required=True)
    parser.add_argument("--batch", type=int, default=1, help="rows of the micro-batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("overrides", nargs="*", help="a.b=c")


def run(args: argparse.Namespace) -> None:
    """Prints on rank 0 what was counted beside the formula.

    Raises:
        UserError: rows cannot be cut into that many pieces, or the processes cannot be shared out.
    """
    config = load_config(args.config, args.overrides)
    place = find_place(os.environ)
    device = device_of_process(place)
    start_processes(place, device, 600)
    size = f"{args.batch} x {args.length} tokens"
    if (context := config.parallel.context) > 1:
        counts = measure_piece_traffic(
            config.model, context=context, batch=args.batch, length=args.length, device=device,
            recompute=config.parallel.recompute,
        )  # fmt: skip
        for rank, (counted, expected) in enumerate(gather_objects(counts)):
            if place.rank == 0:
                show(f"CP {context}, rank {rank}, recompute {config.parallel.recompute}, {size}", counted, expected)
    else:
        for sequence in (False, True):
            counted, expected = measure_traffic(
                config.model, sequence=sequence, batch=args.batch, length=args.length, device=device
            )
            if place.rank == 0:
                layout = f"TP {place.world_size}" + (" + sequence parallelism" if sequence else "")
                show(f"{layout}, {size}", counted, expected)
    stop_processes()


def show(what: str, counted: Traffic, expected: Traffic) -> None:
    """Prints what was counted beside the formula."""
    print(what)
    for name in sorted(counted.calls | expected.calls):
        print(
            f"  {name:15s} {counted.calls[name]:6d} calls (formula {expected.calls[name]})"
            f" {counted.bytes[name] / 2**20:10.3f} MiB (formula {expected.bytes[name] / 2**20:.3f})"
        )
