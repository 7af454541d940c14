"""Speed and memory on one GPU, ours and the peers in the same process.

    python launch/benchmark.py step      a whole training step: forward, backward, clipping, AdamW through DeepSpeed
    python launch/benchmark.py layer     one Mamba-2 layer against mamba_ssm's
    python launch/benchmark.py attention the selective window attention against FlashAttention-2 and flex_attention
    python launch/benchmark.py decode    prefill in chunks and tokens per second by context
    python launch/benchmark.py memory    a training step's memory, and the largest micro batch by kind of recomputation
    python launch/benchmark.py coldstart the first step with an empty and with a filled cache of compiled kernels
    python launch/benchmark.py sync      where in a training step the host waits for the GPU
    python launch/benchmark.py layouts   the same training step on several GPUs, by tensor, data and ZeRO layout
    python launch/benchmark.py data      tokenization (needs no GPU)
    python launch/benchmark.py comm      what tensor parallelism sends (needs no GPU)
    python launch/benchmark.py checkpoint how long training stands still for a save (needs no GPU)

Each prints a table and writes the same numbers as JSON. Times are medians of CUDA events.
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started from a checkout that is not installed

from megatron_taipan.errors import UserError, exits_cleanly

# each is the `run` of launch/benchmark_NAME.py
NEED_CUDA = ("step", "layer", "attention", "decode", "memory", "coldstart", "sync", "layouts")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*NEED_CUDA, "data", "comm", "checkpoint"])
    parser.add_argument("--preset", default="taipan_1.3b", help="a file of launch/configs, without its ending")
    parser.add_argument("--batch", type=int, default=4, help="micro batch (step, memory)")
    parser.add_argument("--largest", type=int, default=64, help="memory: where the search for the largest batch ends")
    parser.add_argument("--ops", default="fast", choices=["fast", "auto", "reference"])
    parser.add_argument("--only", nargs="*", help="step, memory: rows whose names hold these words")
    parser.add_argument("--profile", action="store_true", help="step, layer, decode: also our kernels' times")
    parser.add_argument("--length", type=int, default=32768, help="attention: tokens")
    parser.add_argument("--densities", type=float, nargs="*", default=[0.02, 0.0625, 0.15, 0.25, 0.5])
    parser.add_argument("--skip-flex", action="store_true", help="attention: do not compile flex_attention")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64], help="decode")
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 32768, 131072], help="decode")
    parser.add_argument("--chunk", type=int, default=8192, help="decode: prompt tokens per pass")
    parser.add_argument("--steps", type=int, default=64, help="decode: tokens that are timed")
    parser.add_argument("--layouts", nargs="*", help="layouts: such as '2 tensor=2 micro_batch=8 micro_batches=4'")
    parser.add_argument("--timeout", type=int, default=600, help="layouts: seconds that a row may take")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # a row's own processes
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"), help="folder of the JSON files")
    parser.add_argument("--overrides", nargs="*", default=[], help="settings such as model.gate.capacity=0.3")
    return parser.parse_args(arguments)


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["data"]:
        from launch import benchmark_data

        benchmark_data.run(arguments[1:])
        return 0
    if arguments[:1] == ["comm"]:
        from launch import benchmark_comm

        return benchmark_comm.run(arguments[1:])
    if arguments[:1] == ["checkpoint"]:
        from launch import benchmark_checkpoint

        return benchmark_checkpoint.run(arguments[1:])
    options = parse(arguments)
    if not torch.cuda.is_available():
        raise UserError(
            f"benchmark {options.what} needs a CUDA device and torch sees none; `data`, `comm` and `checkpoint` run"
            " without one"
        )
    importlib.import_module(f"launch.benchmark_{options.what}").run(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
