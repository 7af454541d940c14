"""`benchmark.py decode`: prefill in chunks, and decoded tokens per second by context and batch.

One row of random tokens is prefilled to each context; its state is then repeated for the batch, whose rows go on with
tokens of their own. The gates' thresholds are calibrated first, so that they select their capacity as trained ones do.
"""

import argparse
import copy
import time

import torch

from launch.benchmark_common import Table, preset
from megatron_taipan.evaluation.calibrate import calibrate
from megatron_taipan.inference.stepping import EAGER_STEPS, Stepper
from megatron_taipan.model.cache import Cache
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.ops.dispatch import pick_ops


@torch.inference_mode()
def run(options: argparse.Namespace) -> None:
    table = Table("decode", options.out)
    config = preset(options).model
    with torch.device("cuda"):
        model = Taipan(config, ops=pick_ops(options.ops)).bfloat16().eval()
    contexts = sorted(options.contexts)
    document = torch.randint(0, config.vocab_size, (1, contexts[-1]), device="cuda")
    thresholds = calibrate(model, [{"tokens": document[:, : options.chunk], "seq_idx": None}])
    table.add("thresholds that select the capacity", gates=[round(t, 3) for t in thresholds])
    prefill(model, model.new_cache(1), document[:, : 2 * options.chunk], options.chunk)  # kernels compiled
    cache, times = model.new_cache(1), []
    torch.cuda.reset_peak_memory_stats()
    speeds: dict[int, list[float]] = {batch: [] for batch in options.batches}
    for context in contexts:
        new = context - cache.length
        times.append(prefill(model, cache, document[:, cache.length : context], options.chunk))
        table.add(f"prefill, tokens {context - new} to {context}", ms=round(times[-1], 1),
                  **{"tokens/s": round(new / times[-1] * 1e3)})  # fmt: skip
        for batch in options.batches:
            numbers = decode(model, cache, batch, options.steps, captured=True)
            speeds[batch].append(numbers["tokens/s"])
            table.add(f"decode, batch {batch}, context {context}", **numbers)
            torch.cuda.empty_cache()
    total = sum(times) / 1e3
    table.add(f"prefill of {contexts[-1]} tokens in chunks of {options.chunk}", seconds=round(total, 2),
              **{"tokens/s": round(contexts[-1] / total)})  # fmt: skip
    for batch, found in speeds.items():
        table.add(f"batch {batch}: slowest context / fastest", ratio=round(min(found) / max(found), 4))
    table.add("decode, batch 1, without a captured graph", **decode(model, cache, 1, options.steps, captured=False))


def prefill(model: Taipan, cache: Cache, tokens: torch.Tensor, chunk: int) -> float:
    """Milliseconds in which the cache takes in [1, l] tokens."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    for part in tokens.split(chunk, 1):
        model(part, cache=cache, all_logits=False)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) * 1e3


def decode(model: Taipan, prefilled: Cache, batch: int, steps: int, *, captured: bool) -> dict:
    """The mean over `steps` tokens of every row: an average, because few tokens in a window move its buffer."""
    cache = copy.deepcopy(prefilled)
    cache.select(torch.zeros(batch, dtype=torch.int64, device="cuda"))
    stepper = Stepper(model, cache, captured=captured)
    warm = EAGER_STEPS + 2
    tokens = torch.randint(0, model.config.vocab_size, (steps + warm, batch, 1), device="cuda")
    for token in tokens[:warm]:
        stepper.step(token)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for token in tokens[warm:]:
        stepper.step(token)
    torch.cuda.synchronize()
    ms = (time.perf_counter() - began) * 1e3 / steps
    return {
        "ms per token": round(ms, 3), "tokens/s": round(batch / ms * 1e3), "cache MiB": round(cache.n_bytes() / 2**20),
    }  # fmt: skip
