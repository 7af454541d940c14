"""Speed and memory of this project and of its peers, in the same process.

    python -m benchmarks step --help

Each prints a table and writes the same numbers as JSON. Times on a GPU are medians of CUDA events.
"""

import argparse
import importlib
import sys
from typing import NamedTuple

import torch

from megatron_taipan.errors import UserError
from megatron_taipan.programs import exits_cleanly


class Benchmark(NamedTuple):
    """A benchmark: the module of that name in this package, with `add_arguments(parser)` and `run(options)`."""

    help: str
    needs_gpu: bool = True


BENCHMARKS = {
    "step": Benchmark("a whole training step: forward, backward, clipping, AdamW through DeepSpeed"),
    "lengths": Benchmark("tokens per second of a training step by length of its rows, as a table and a picture"),
    "layer": Benchmark("one Mamba-2 layer against mamba_ssm's"),
    "attention": Benchmark("selective window attention against FlashAttention-2 and flex_attention"),
    "ops": Benchmark("each operation by each implementation that can be chosen for it"),
    "decode": Benchmark("prefill in chunks and tokens per second by context"),
    "memory": Benchmark("a training step's memory, and the largest micro batch by kind of recomputation"),
    "kept": Benchmark("what each layer keeps for its backward pass, tensor by tensor"),
    "coldstart": Benchmark("the first step with an empty and with a filled cache of compiled kernels"),
    "sync": Benchmark("where in a training step the host waits for the GPU"),
    "layouts": Benchmark("the same training step on several GPUs, by tensor, data and ZeRO layout"),
    "data": Benchmark("tokenization and reading (needs no GPU)", needs_gpu=False),
    "comm": Benchmark("what tensor or context parallelism sends (needs no GPU)", needs_gpu=False),
    "checkpoint": Benchmark("how long training pauses for a save (needs no GPU)", needs_gpu=False),
}


def make_parser(chosen: str) -> argparse.ArgumentParser:
    """The command line; only the chosen benchmark is imported, and so only its arguments are known."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, benchmark in BENCHMARKS.items():
        module = importlib.import_module(f"benchmarks.{name}") if name == chosen else None
        command = commands.add_parser(
            name,
            help=benchmark.help,
            description=module.__doc__ if module else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if module is not None:
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    return parser


@exits_cleanly
def main(arguments: list[str] | None = None) -> int | None:
    """The program."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = make_parser(arguments[0] if arguments else "")
    options = parser.parse_args(arguments)
    measures = not getattr(options, "table", False)  # what was measured elsewhere can be drawn anywhere
    if BENCHMARKS[options.benchmark].needs_gpu and measures and not torch.cuda.is_available():
        free = ", ".join(name for name, benchmark in BENCHMARKS.items() if not benchmark.needs_gpu)
        raise UserError(
            f"benchmark {options.benchmark} needs a CUDA device and torch sees none; these run without one: {free}"
        )
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
