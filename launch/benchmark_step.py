"""`benchmark.py step`: whole training steps through DeepSpeed, ours and the peers'."""

import argparse
import cProfile
import pstats
import sys
import time
from collections.abc import Callable

import torch

from launch import benchmark_peers
from launch.benchmark_common import Table, kernel_times, median_ms, preset, single_process
from megatron_taipan.config import Config
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.ops.dispatch import pick_ops


def run(options: argparse.Namespace) -> None:
    table = Table("step", options.out)
    config = preset(options)
    peers = {
        "transformer++ compiled": lambda: peer_step(benchmark_peers.transformer, config, options.profile),
        "composition of today's parts, compiled": lambda: peer_step(
            lambda model: benchmark_peers.composition(model, config.data.seq_len), config, options.profile
        ),
    }
    rows = {config.name: lambda: our_step(config, options.profile)} | peers
    for name, measure in rows.items():
        if not options.only or any(part in name for part in options.only):
            table.attempt(name, measure)


def our_step(config: Config, profiled: bool) -> dict:
    """Our trainer's own engine and step on random tokens; the gates' bias is set so that they select C."""
    from megatron_taipan.train.engine import build_engine, capture_graphs
    from megatron_taipan.train.step import train_step

    device, groups = single_process(config)
    with torch.device(device):
        model = Taipan(config.model, ops=pick_ops(config.ops.backend), recompute=config.parallel.recompute)
    select_capacity(model, config)
    engine = build_engine(model, config, groups, device)
    print(capture_graphs(model, config, device), flush=True)
    tokens = torch.randint(
        0, config.model.vocab_size, (config.train.micro_batch, config.data.seq_len + 1), device=device
    )
    batch = {
        "tokens": tokens[:, :-1], "labels": tokens[:, 1:],
        "seq_idx": torch.zeros_like(tokens[:, 1:], dtype=torch.int32),
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
        print_profile(step)
    engine.destroy()
    return numbers


def print_profile(step: Callable[[], None]) -> None:
    """One step's kernels, then where the CPU spent another one."""
    for name, ms in kernel_times(step, 45).items():
        print(f"    {ms:9.3f}  {name}", flush=True)
    profile = cProfile.Profile()
    profile.runcall(step)
    pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(25)


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


def peer_step(build: Callable, config: Config, profiled: bool) -> dict:
    """A peer, compiled, through DeepSpeed with the same settings as ours, what we quickened there included."""
    import deepspeed

    from megatron_taipan.train.engine import count_parameters, deepspeed_config, make_optimizer
    from megatron_taipan.train.zero import quicken

    device, groups = single_process(config)
    with torch.device(device):
        model = build(config.model).to(torch.bfloat16)
    optimizer = make_optimizer([{"params": list(model.parameters()), "weight_decay": 0.01}], config.optim)
    settings = deepspeed_config(config, groups, count_parameters(model))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=groups.mpu)
    engine.optimizer.check_grad_overflow = True
    quicken(engine.optimizer)
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
    if profiled:
        print_profile(step)
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
