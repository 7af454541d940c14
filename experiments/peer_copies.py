"""One edge between two blocks over two tensor ranks: products alone, with collectives, and with copies under them.

    torchrun --nproc_per_node 2 -m experiments.peer_copies [--tokens 16384 --width 2048]

    (the figures of docs/performance.md: with TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NCCL_NVLS_ENABLE=0 in the environment)

Forward: the partial product that leaves a block, its sum over the ranks, and the product into the next block. Backward:
the gradient of that input, its sum, the weight's gradient, and the product after it (a block's backward pass also
gathers the input once more, and computes the gradient of the weight before). Each as a CUDA graph of four runs, in ms;
the copies are those of `OverlappedComm` (parallel/overlapped_comm.py).
"""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import median_ms, recorded
from megatron_taipan.errors import UserError
from megatron_taipan.parallel.connect import connect
from megatron_taipan.parallel.processes import device_of_process, find_place, stop_processes
from megatron_taipan.parallel_config import ParallelConfig
from megatron_taipan.programs import exits_cleanly
from megatron_taipan.train.distributed import start_processes

TIMES = 4  # runs in a graph, so that its start and end weigh little


def edges(n: int, width: int, inner: int, joint: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """What is timed, by name; n tokens, weights [width, inner] out of a block and [joint, width] into the next.

    Raises:
        UserError: the ranks cannot share the tokens, or reach each other's memory.
    """
    if dist.get_world_size() < 2 or n % dist.get_world_size():
        raise UserError(f"{dist.get_world_size()} processes cannot share {n} tokens; take 2, or another divisor")
    config = ParallelConfig(tensor=dist.get_world_size(), sequence=True)
    groups, report = connect(config, device, n)
    tp, comm = groups.tensor, groups.tensor.overlapped_comm
    if comm is None:
        raise UserError(f"there is no overlapped communication to measure: {report}")

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device)

    y, w_out, w_in, x, dz = (
        random(n, inner),
        random(width, inner),
        random(joint, width),
        random(n, width),
        random(n, joint),
    )
    shard = random(n // tp.size, width)

    def part(t: Tensor, rank: int) -> Tensor:
        return t.chunk(tp.size)[rank]

    def reduced(t: Tensor) -> Tensor:
        dist.all_reduce(t, group=tp.group)
        return t

    def scattered(t: Tensor) -> Tensor:
        dist.reduce_scatter_tensor(shard, t, group=tp.group)
        dist.all_gather_into_tensor(x, shard, group=tp.group)
        return x

    def chunks_forward() -> object:
        out = y.new_empty(n, joint)
        mine = comm.scatter(lambda rank: part(y, rank) @ w_out.t())
        comm.gather(mine, lambda rank, chunk: torch.mm(chunk, w_in.t(), out=part(out, rank)))
        return out

    def chunks_backward() -> object:
        kept: list[Tensor] = []
        mine = comm.scatter(
            lambda rank: part(dz, rank) @ w_in,
            lambda: kept.append(dz.t() @ x),
            lambda total: total.addmm_(part(dz, tp.rank), w_in),
        )
        out = y.new_empty(n, inner)
        comm.gather(mine, lambda rank, chunk: torch.mm(chunk, w_out, out=part(out, rank)))
        return kept, out

    return {
        "forward, no communication": lambda: F.linear(F.linear(y, w_out), w_in),
        "forward, all-reduce": lambda: F.linear(reduced(F.linear(y, w_out)), w_in),
        "forward, reduce-scatter and all-gather": lambda: F.linear(scattered(F.linear(y, w_out)), w_in),
        "forward, overlapped chunks": chunks_forward,
        "backward, no communication": lambda: (dz.t() @ x, (dz @ w_in) @ w_out),
        "backward, all-reduce": lambda: (dz.t() @ x, reduced(dz @ w_in) @ w_out),
        "backward, overlapped chunks": chunks_backward,
    }


def repeat(run: Callable[[], object], times: int) -> list[object]:
    """The results of `times` runs."""
    return [run() for _ in range(times)]


@exits_cleanly
def main() -> int:
    """The program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 16384), ("width", 2048), ("inner", 2048), ("joint", 4384)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("this measures GPUs and torch sees none; run it on a machine with at least two")
    place = find_place(os.environ)
    device = device_of_process(place)
    start_processes(place, device, 600)
    for name, run in edges(options.tokens, options.width, options.inner, options.joint, device).items():
        graph, _ = recorded(partial(repeat, run, TIMES))
        ms = median_ms(graph.replay, before=dist.barrier) / TIMES
        if place.rank == 0:
            print(f"{name:40s} {ms:.3f} ms", flush=True)
        del graph  # NCCL hangs when it leaves a communicator that a graph still uses
    dist.barrier()
    stop_processes()
    sys.stdout.flush()
    os._exit(0)  # as launch/pretrain.py


if __name__ == "__main__":
    sys.exit(main())
