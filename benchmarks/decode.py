"""`python -m benchmarks decode`: prefill in chunks, and decoded tokens per second by context and batch.

One row of random tokens is prefilled to each context; its state is then repeated for the batch, whose rows continue
with different tokens. An untrained gate selects more or fewer tokens as the context grows, and a selected token reads a
window of keys; so the thresholds are set again at each context, for the share of selected tokens to be the capacity, as
with trained gates. The clock rate of a GPU under load differs from that at rest: each row first decodes for a while.
"""

import argparse
import copy
import itertools
import time
from typing import Any

import torch

from benchmarks.common import Table, add_preset, kernel_times, preset
from megatron_taipan.evaluation.calibrate import calibrate
from megatron_taipan.inference.stepping import EAGER_STEPS, Stepper
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
        model = Taipan(config, ops=pick_ops(options.ops)).bfloat16().eval()
    contexts = sorted(options.contexts)
    document = torch.randint(0, config.vocab_size, (1, contexts[-1]), device="cuda")
    calibrate(model, [{"tokens": document[:, : options.chunk], "seq_idx": None}])  # for the prefill
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
    calibrate(model, [{"tokens": document[:, : options.chunk], "seq_idx": None}])
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


def time_prefill(model: Taipan, cache: Cache, tokens: torch.Tensor, chunk: int) -> float:
    """Milliseconds to prefill the cache with [1, l] tokens."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for part in tokens.split(chunk, 1):
        model(part, cache=cache, all_logits=False)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3


def decode(
    model: Taipan, prefilled: Cache, batch: int, steps: int, *, captured: bool, profiled: bool = False
) -> dict[str, Any]:
    """Median and mean over `steps` tokens of every row (the mean holds the rare moves of a window's buffer)."""
    cache = repeat_cache(prefilled, batch)
    stepper = Stepper(model, cache, captured=captured)
    tokens = torch.randint(0, model.config.vocab_size, (steps, batch, 1), device="cuda")
    selected = selected_share(model, stepper, tokens[:EAGER_STEPS])
    began = time.perf_counter()
    while time.perf_counter() - began < WARM_S:
        stepper.step(tokens[0])
        torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for token, mark in zip(tokens, marks[1:], strict=True):
        stepper.step(token)
        mark.record()
    torch.cuda.synchronize()
    times = sorted(a.elapsed_time(b) for a, b in itertools.pairwise(marks))
    ms = times[len(times) // 2]
    numbers: dict[str, Any] = {
        "ms per token": round(ms, 3), "mean ms": round(sum(times) / steps, 3), "tokens/s": round(batch / ms * 1e3),
        "selected": selected, "cache MiB": round(cache.n_bytes() / 2**20),
    }  # fmt: skip
    return numbers | (kernel_times(lambda: stepper.step(tokens[0]), 20) if profiled else {})


def repeat_cache(prefilled: Cache, batch: int) -> Cache:
    """A copy of the one prefilled row for every row of a batch."""
    cache = copy.deepcopy(prefilled)
    cache.select(torch.zeros(batch, dtype=torch.int64, device="cuda"))
    return cache


def settle_gates(model: Taipan, prefilled: Cache, batch: int = 32, steps: int = 4) -> None:
    """Sets each gate's threshold so that it selects its capacity of decoded tokens, from the first layer on: what one
    layer selects changes what the next one sees."""
    cache = repeat_cache(prefilled, batch)
    for gate in [layer.gate for layer in model.layers if hasattr(layer, "gate")]:
        margins: list[torch.Tensor] = []
        hook = gate.register_forward_hook(lambda _, __, out, into=margins: into.append(out.margin.flatten()))
        for token in torch.randint(0, model.config.vocab_size, (steps, batch, 1), device="cuda"):
            model.step(token, cache)
        hook.remove()
        gate.threshold.copy_(torch.cat(margins).float().quantile(1 - model.config.gate.final_capacity))


def selected_share(model: Taipan, stepper: Stepper, tokens: torch.Tensor) -> float:
    """Runs the first steps, launched kernel by kernel, and returns the share of rows that their gates selected."""
    shares: list[torch.Tensor] = []
    gates = [layer.gate for layer in model.layers if hasattr(layer, "gate")]
    hooks = [
        gate.register_forward_hook(lambda _, __, out: shares.append(out.selected.float().mean())) for gate in gates
    ]
    for token in tokens:
        stepper.step(token)
    for hook in hooks:
        hook.remove()
    return round(torch.stack(shares).mean().item(), 3) if shares else 0.0
