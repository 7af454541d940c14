# ruff: noqa: B023, E501  (every measurement runs inside the loop turn that defines it)
"""Speed and memory on one GPU, ours and the peers in the same process.

    python launch/benchmark.py step      a whole training step: forward, backward, clipping, AdamW through DeepSpeed
    python launch/benchmark.py layer     one Mamba-2 layer against mamba_ssm's
    python launch/benchmark.py attention the selective window attention against FlashAttention-2 and flex_attention
    python launch/benchmark.py decode    prefill in chunks and tokens per second by context
    python launch/benchmark.py memory    the largest micro batch, with and without recomputation
    python launch/benchmark.py data      tokenization (needs no GPU)

Each prints a table and writes the same numbers as JSON. Times are medians of CUDA events.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started from a checkout that is not installed

from launch import benchmark_peers
from megatron_taipan.config import Config, load_config
from megatron_taipan.errors import UserError, exits_cleanly
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.ops.dispatch import pick_ops

PEAK_BF16 = {"NVIDIA H100 80GB HBM3": 989.4, "NVIDIA H200": 989.4}  # TFLOP/s, dense, NVIDIA's data sheets
HERE = Path(__file__).resolve().parent


class Table:
    """Rows of one benchmark, printed as they come and kept as JSON beside."""

    def __init__(self, name: str, out: Path):
        self.path, self.rows = out / f"benchmark_{name}.json", []
        self.about = hardware()
        print("; ".join(f"{k}: {v}" for k, v in self.about.items()), flush=True)

    def add(self, what: str, **numbers: Any) -> None:
        self.rows.append({"what": what, **numbers})
        print(f"{what:52s} " + "  ".join(f"{k} {v}" for k, v in numbers.items()), flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        with part.open("w") as file:
            json.dump({"about": self.about, "rows": self.rows}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)

    def attempt(self, what: str, measure: Callable[[], dict]) -> None:
        """Adds what `measure` returns; a peer that is missing or does not fit is a row that says so."""
        try:
            numbers = measure()
        except (ImportError, torch.OutOfMemoryError, RuntimeError) as error:
            numbers = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0][:150]}"}
        self.add(what, **numbers)
        gc.collect()
        torch.cuda.empty_cache()


def hardware() -> dict[str, str]:
    """The GPU and the versions that the numbers belong to."""
    about = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__}
    for package in ("triton", "deepspeed", "mamba_ssm", "flash_attn"):
        try:
            about[package] = __import__(package).__version__
        except Exception as error:  # a peer that does not import is named, not needed
            about[package] = f"missing ({type(error).__name__})"
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
        peak = PEAK_BF16.get(about["gpu"])
        about["bf16 peak"] = f"{peak} TFLOP/s" if peak else "unknown peak"
    return about


def median_ms(run: Callable[[], Any], repeats: int = 11, warm: int = 3, ahead: bool = True) -> float:
    """Milliseconds on the GPU, the median of `repeats` runs.

    ahead: the GPU first sleeps for a few milliseconds, so that the launches of a short operation are all queued
    before it starts and the time is the GPU's, not the CPU's.
    """
    for _ in range(warm):
        run()
    times = []
    for _ in range(repeats):
        if ahead:
            torch.cuda._sleep(20_000_000)  # cycles, about 11 ms
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def kernel_times(run: Callable[[], Any], top: int) -> dict[str, float]:
    """Milliseconds by kernel of one run, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    times = {event.key[:70]: event.self_device_time_total / 1e3 for event in profile.key_averages()}
    longest = sorted(times.items(), key=lambda item: -item[1])[:top]
    return {"all kernels": round(sum(times.values()), 2)} | {name: round(ms, 3) for name, ms in longest}


# --- a training step -------------------------------------------------------------------------------------------------


def benchmark_step(options: argparse.Namespace) -> None:
    table = Table("step", options.out)
    config = preset(options)
    peers = {
        "transformer++ compiled": lambda: peer_step(benchmark_peers.transformer, config, compiled=True),
        "composition of today's parts, compiled": lambda: peer_step(
            lambda model: benchmark_peers.composition(model, config.data.seq_len), config, compiled=True
        ),
    }
    rows = {config.name: lambda: our_step(config, options.profile)} | peers
    for name, measure in rows.items():
        if not options.only or any(part in name for part in options.only):
            table.attempt(name, measure)


def preset(options: argparse.Namespace) -> Config:
    """A preset as a run on one GPU: one micro batch a step."""
    overrides = [f"train.global_batch={options.batch}", f"train.micro_batch={options.batch}"]
    overrides += ["parallel.recompute=none", f"ops.backend={options.ops}", *options.overrides]
    return load_config(HERE / "configs" / f"{options.preset}.yaml", overrides)


def our_step(config: Config, profiled: bool) -> dict:
    """Our trainer's own engine and step on random tokens; the gates' bias is set so that they select C."""
    from megatron_taipan.train.engine import build_engine
    from megatron_taipan.train.step import train_step

    device, groups = single_process(config)
    with torch.device(device):
        model = Taipan(config.model, ops=pick_ops(config.ops.backend), recompute=config.parallel.recompute)
    select_capacity(model, config)
    engine = build_engine(model, config, groups, device)
    tokens = torch.randint(
        0, config.model.vocab_size, (config.train.micro_batch, config.data.seq_len + 1), device=device
    )
    batch = {
        "tokens": tokens[:, :-1], "labels": tokens[:, 1:], "seq_idx": torch.zeros_like(tokens[:, 1:], dtype=torch.int32),
        "loss_mask": torch.ones(tokens[:, 1:].shape, device=device), "sample": torch.arange(len(tokens), device=device),
    }  # fmt: skip
    results = []

    def step() -> None:
        results.append(train_step(engine, [batch], step=len(results), groups=groups, grad_clip=config.optim.grad_clip))

    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    numbers = step_numbers(step, config, first)
    numbers["loss"] = f"{results[0].loss:.3f} -> {results[-1].loss:.3f}"
    if results[-1].gates:
        numbers["selected"] = round(sum(g["selected"] for g in results[-1].gates) / len(results[-1].gates), 3)
    if profiled:
        for name, ms in kernel_times(step, 40).items():
            print(f"    {ms:9.3f} ms  {name}", flush=True)
    engine.destroy()
    return numbers


def select_capacity(model: torch.nn.Module, config: Config) -> None:
    """Makes every gate choose about C of the tokens, as a trained one does: weight 0, bias at log(C / (1 - C))."""
    capacity = min(max(config.model.gate.capacity, 1e-6), 1 - 1e-6)
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            torch.nn.init.zeros_(parameter)
        if name.endswith("gate.bias"):
            with torch.no_grad():
                parameter.copy_(torch.tensor([0.0, capacity / (1 - capacity)], device=parameter.device))
                parameter[1].log_()


def peer_step(build: Callable, config: Config, compiled: bool) -> dict:
    """A peer through DeepSpeed with the same settings as ours."""
    import deepspeed

    from megatron_taipan.train.engine import count_parameters, deepspeed_config, make_optimizer

    device, groups = single_process(config)
    with torch.device(device):
        model = build(config.model).to(torch.bfloat16)
    optimizer = make_optimizer([{"params": list(model.parameters()), "weight_decay": 0.01}], config.optim)
    settings = deepspeed_config(config, groups, count_parameters(model))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=groups.mpu)
    if compiled:
        engine.module.compile()
    tokens = torch.randint(
        0, config.model.vocab_size, (config.train.micro_batch, config.data.seq_len + 1), device=device
    )

    def step() -> None:
        engine.backward(engine(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()))
        engine.step()

    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    numbers = step_numbers(step, config, time.perf_counter() - began)
    engine.destroy()
    return numbers


def step_numbers(step: Callable[[], None], config: Config, first: float) -> dict:
    torch.cuda.reset_peak_memory_stats()
    ms = median_ms(step, repeats=7, warm=3, ahead=False)
    tokens = config.train.micro_batch * config.data.seq_len
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {
        "ms": round(ms, 1),
        "tokens/s": round(tokens / ms * 1e3),
        "GiB": round(peak, 1),
        "first step s": round(first, 1),
    }


def single_process(config: Config) -> tuple[torch.device, Any]:
    """Process groups of one process, made once."""
    import torch.distributed as dist

    from megatron_taipan.parallel.groups import build_groups
    from megatron_taipan.train.distributed import find_place, pick_device, start_processes

    place = find_place(os.environ)
    device = pick_device(place)
    if not dist.is_initialized():
        start_processes(place, device, config.parallel.timeout_s)
    return device, build_groups(world_size=1, rank=0)


# --- one layer -------------------------------------------------------------------------------------------------------


def benchmark_layer(options: argparse.Namespace) -> None:
    table = Table("layer", options.out)
    for batch, length in ((4, 4096), (1, 32768)):
        x = torch.randn(batch, length, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn_like(x)
        table.attempt(f"ours, {batch} x {length}", lambda: layer_times(our_mamba_layer(), x, grad, options.profile))
        table.attempt(f"mamba_ssm, {batch} x {length}", lambda: layer_times(peer_mamba_layer(), x, grad, False))


def layer_times(layer: Callable, x: torch.Tensor, grad: torch.Tensor, profiled: bool) -> dict:
    def both() -> None:
        layer(x).backward(grad)

    numbers = {"forward ms": round(median_ms(lambda: layer(x)), 3), "forward+backward ms": round(median_ms(both), 3)}
    if profiled:
        for name, ms in kernel_times(both, 24).items():
            print(f"    {ms:9.3f} ms  {name}", flush=True)
    return numbers


def our_mamba_layer() -> Callable:
    """The mixer of the 1.3B preset, alone."""
    from megatron_taipan.config import ModelConfig
    from megatron_taipan.model.context import make_context

    config = ModelConfig(pattern="M", vocab_size=64, d_model=2048, d_ff=64)
    with torch.device("cuda"):
        mixer = Taipan(config, ops=pick_ops("fast")).bfloat16().layers[0].mixer

    def run(x: torch.Tensor) -> torch.Tensor:
        return mixer(x, make_context(x[..., 0], None, None, 0, None))

    return run


def peer_mamba_layer() -> Callable:
    from mamba_ssm.modules.mamba2 import Mamba2

    return Mamba2(2048, d_state=128, headdim=64, expand=2, device="cuda", dtype=torch.bfloat16)


# --- attention -------------------------------------------------------------------------------------------------------


def benchmark_attention(options: argparse.Namespace) -> None:
    from megatron_taipan.ops.interval_attention_triton import interval_attention

    table = Table("attention", options.out)
    total, heads, d, window = options.length, 16, 128, 2048

    def tensor(n: int) -> torch.Tensor:
        return torch.randn(n, heads, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    k, v = tensor(total), tensor(total)

    def times(attend: Callable, n: int) -> dict:
        q = tensor(n)
        grad = torch.randn(n, heads, d, device="cuda", dtype=torch.bfloat16)
        both = median_ms(lambda: torch.autograd.grad(attend(q), (q, k, v), grad))
        return {"forward ms": round(median_ms(lambda: attend(q)), 3), "forward+backward ms": round(both, 3)}

    def flash(q: torch.Tensor) -> torch.Tensor:
        from flash_attn import flash_attn_func

        return flash_attn_func(q[None], k[None], v[None], causal=True, window_size=(window - 1, 0))[0]

    table.attempt("FlashAttention-2, all queries", lambda: times(flash, total))
    for density in options.densities:
        hi = (torch.rand(total, device="cuda") < density).nonzero()[:, 0].int()
        lo = (hi - window + 1).clamp(min=0)
        n = len(hi)
        at = f"{density:.1%} selected"
        table.attempt(f"ours, {at}", lambda: times(lambda q: interval_attention(q, k, v, lo, hi), n))
        if not options.skip_flex:
            table.attempt(f"flex, {at}", lambda: times(flex_gathered(lo, hi, k, v), n))


def flex_gathered(lo: torch.Tensor, hi: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable:
    """flex_attention on gathered queries, its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n = len(lo)
    mask = torch.compile(create_block_mask)(
        lambda b, h, q, key: (key >= lo[q]) & (key <= hi[q]), None, None, n, len(k), device="cuda"
    )
    flex = torch.compile(flex_attention, dynamic=False)

    def attend(q: torch.Tensor) -> torch.Tensor:
        return flex(*(t.transpose(0, 1)[None] for t in (q, k, v)), block_mask=mask)[0].transpose(0, 1)

    return attend


# --- generation ------------------------------------------------------------------------------------------------------


def benchmark_decode(options: argparse.Namespace) -> None:
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


# --- memory ----------------------------------------------------------------------------------------------------------


def benchmark_memory(options: argparse.Namespace) -> None:
    table = Table("memory", options.out)
    for recompute in ("none", "selective", "full"):
        batch = options.batch
        while batch <= options.largest:
            options.overrides, options.batch = [f"parallel.recompute={recompute}"], batch
            config = preset(options)
            table.attempt(f"{config.name}, micro batch {batch}, recompute {recompute}", lambda: our_step(config, False))
            if "failed" in table.rows[-1]:
                break
            batch *= 2
        options.batch = 4


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "layer", "attention", "decode", "memory", "data", "comm"])
    parser.add_argument("--preset", default="taipan_1.3b", help="a file of launch/configs, without its ending")
    parser.add_argument("--batch", type=int, default=4, help="micro batch (step, memory)")
    parser.add_argument("--largest", type=int, default=64, help="memory: where the search for the largest batch ends")
    parser.add_argument("--ops", default="fast", choices=["fast", "auto", "reference"])
    parser.add_argument("--only", nargs="*", help="step: rows whose names hold one of these words")
    parser.add_argument("--profile", action="store_true", help="step, layer: also our kernels' times")
    parser.add_argument("--length", type=int, default=32768, help="attention: tokens")
    parser.add_argument("--densities", type=float, nargs="*", default=[0.02, 0.0625, 0.15, 0.25, 0.5])
    parser.add_argument("--skip-flex", action="store_true", help="attention: do not compile flex_attention")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 64], help="decode")
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 32768, 131072], help="decode")
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
    options = parse(arguments)
    if not torch.cuda.is_available():
        raise UserError(
            f"benchmark {options.what} needs a CUDA device and torch sees none; `data` and `comm` run without one"
        )
    benchmarks = {
        "step": benchmark_step, "layer": benchmark_layer, "attention": benchmark_attention, "decode": benchmark_decode,
        "memory": benchmark_memory,
    }  # fmt: skip
    benchmarks[options.what](options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
