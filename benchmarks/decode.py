"""`python -m benchmarks decode`: prefill in chunks, and decoded tokens per second by context and batch.

One row of random tokens is prefilled to each context; its state is then repeated for the batch, whose rows continue
with different tokens. An untrained gate selects more or fewer tokens as the context grows, and a selected token reads a
window of keys; so the thresholds are set again at each context, for the share of selected tokens to be the capacity, as
with trained gates. The clock rate of a GPU under load differs from that at rest: each row first decodes for a while.
`python -m megatron_taipan.evaluation latency` times trained models and compares several, by the same functions.
"""

import argparse
import itertools
from typing import Any

import torch

from benchmarks.common import Table, add_preset, kernel_times, preset
from megatron_taipan.evaluation.decode_timing import (
    fork_cache,
    settle_for_prefill,
    settle_gates,
    time_decode,
    time_prefill,
)
from megatron_taipan.inference.stepping import Stepper
from megatron_taipan.model.cache import Cache
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.ops.dispatch import pick_ops

WARM_S = 6.0  # seconds of decoding before the first measured token


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    add_preset(parser)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64])
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 32768, 131072])
    parser.add_argument("--chunk", type=int, default=8192, help="prompt tokens per pass")
    parser.add_argument("--steps", type=int, default=64, help="tokens that are timed")
    parser.add_argument("--profile", action="store_true", help="also our kernels' times")


@torch.inference_mode()
def run(options: argparse.Namespace) -> None:
    table = Table("decode", options.out)
    config = preset(options).model
    with torch.device("cuda"):
        model = Taipan(config, ops=pick_ops(options.ops)).bfloat16().eval().requires_grad_(False)
    contexts = sorted(options.contexts)
    document = torch.randint(0, config.vocab_size, (1, contexts[-1]), device="cuda")
    settle_for_prefill(model, document[:, : options.chunk])
    warm = model.new_cache(1)  # the same chunks as below: kernels are compiled for their sizes
    for first, last in itertools.pairwise([0, *contexts[:2]]):
        time_prefill(model, warm, document[:, first:last], options.chunk)
    for batch in options.batches:  # each by itself: what a large batch leaves in the memory slows a small one down
        by_context(table, model, document, contexts, batch, options)
        torch.cuda.empty_cache()
    once = model.new_cache(1)
    time_prefill(model, once, document[:, : contexts[0]], options.chunk)
    table.add("decode, batch 1, without a captured graph", **decode(model, once, 1, options.steps, captured=False))


def by_context(
    table: Table, model: Taipan, document: torch.Tensor, contexts: list[int], batch: int, options: argparse.Namespace
) -> None:
    """The rows of one batch."""
    settle_for_prefill(model, document[:, : options.chunk])
    cache, times, speeds = model.new_cache(1), [], []
    for context in contexts:
        new = context - cache.length
        times.append(time_prefill(model, cache, document[:, cache.length : context], options.chunk))
        table.add(f"prefill, tokens {context - new} to {context}", ms=round(times[-1], 1),
                  **{"tokens/s": round(new / times[-1] * 1e3)})  # fmt: skip
        settle_gates(model, cache)
        numbers = decode(model, cache, batch, options.steps, captured=True, profiled=options.profile)
        speeds.append(numbers["tokens/s"])
        table.add(f"decode, batch {batch}, context {context}", **numbers)
        torch.cuda.empty_cache()
    total = sum(times) / 1e3
    table.add(f"prefill of {contexts[-1]} tokens in chunks of {options.chunk}", seconds=round(total, 2),
              **{"tokens/s": round(contexts[-1] / total)})  # fmt: skip
    table.add(f"batch {batch}: slowest context / fastest", ratio=round(min(speeds) / max(speeds), 4))


def decode(
    model: Taipan, prefilled: Cache, batch: int, steps: int, *, captured: bool, profiled: bool = False
) -> dict[str, Any]:
    """Median and mean over `steps` tokens of every row (the mean holds the rare moves of a window's buffer)."""
    cache = fork_cache(prefilled, batch)
    stepper = Stepper(model, cache, captured=captured)
    found = time_decode(model, stepper, batch, steps, warm_s=WARM_S)
    numbers: dict[str, Any] = {
        "ms per token": round(found.ms, 3), "mean ms": round(found.mean_ms, 3),
        "tokens/s": round(batch / found.ms * 1e3), "selected": found.selected,
        "cache MiB": round(cache.n_bytes() / 2**20),
    }  # fmt: skip
    if not profiled:
        return numbers
    token = torch.zeros(batch, 1, dtype=torch.int64, device="cuda")
    return numbers | kernel_times(lambda: stepper.step(token), 20)
