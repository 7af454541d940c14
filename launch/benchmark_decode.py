# ruff: noqa: B023  (every measurement runs inside the loop turn that defines it)
"""`benchmark.py decode`: prefill in chunks and decoded tokens per second by context."""

import argparse
import time
from typing import Any

import torch

from launch.benchmark_common import Table, preset
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.ops.dispatch import pick_ops


def run(options: argparse.Namespace) -> None:
    table = Table("decode", options.out)
    config = preset(options).model
    with torch.device("cuda"):
        model = Taipan(config, ops=pick_ops(options.ops)).bfloat16().eval()
    with torch.no_grad():
        for batch in options.batches:
            cache = model.new_cache(batch, "cuda", torch.bfloat16)
            for context in sorted(options.contexts):
                table.attempt(f"batch {batch}, context {context}", lambda: decode_times(model, cache, batch, context))


def decode_times(model: Taipan, cache: Any, batch: int, context: int, chunk: int = 4096, steps: int = 16) -> dict:
    """Extends the cache to `context` tokens in chunks, then single tokens."""
    tokens = torch.randint(0, model.config.vocab_size, (batch, chunk), device="cuda")
    torch.cuda.synchronize()
    began, done = time.perf_counter(), cache.length
    while cache.length < context:
        model(tokens[:, : context - cache.length], cache=cache, all_logits=False)
    torch.cuda.synchronize()
    prefill = time.perf_counter() - began
    new = cache.length - done
    times = []
    for _ in range(steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(tokens[:, :1], cache=cache, all_logits=False)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    ms = sorted(times)[steps // 2] * 1e3
    return {
        "prefill tokens/s": round(batch * new / prefill) if new else "-", "ms per token": round(ms, 2),
        "tokens/s": round(batch / ms * 1e3), "cache MiB": round(cache.n_bytes() / 2**20),
    }  # fmt: skip
