"""`python -m benchmarks step`: whole training steps through DeepSpeed, of this project and of its peers."""

import argparse
import cProfile
import pstats
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks import peers
from benchmarks.autotune import compile_ahead
from benchmarks.common import Table, add_preset, join_processes, kernel_times, median_step_ms, preset
from megatron_taipan.config import Config
from megatron_taipan.engine.operations import choose_operations
from megatron_taipan.errors import UserError
from megatron_taipan.parallel.context import ContextParallel
from megatron_taipan.train.step import StepResult


@dataclass
class Training:
    """A model in training: `step` makes one training step on random tokens."""

    engine: Any
    step: Callable[[], None]
    results: list[StepResult]  # ours only
    graphs: ExitStack = field(default_factory=ExitStack)  # ours only: releases the recorded graphs
    layers: str = ""  # ours only: whether they run as recorded graphs, or why not

    def end(self) -> None:
        self.graphs.close()
        self.engine.destroy()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    add_preset(parser)
    parser.add_argument("--only", nargs="*", help="rows whose names hold these words")
    parser.add_argument("--profile", action="store_true", help="also our kernels' times")
    parser.add_argument(
        "--documents", type=int, default=1, help="of equal length, packed in each of our rows; default: 1"
    )


def run(options: argparse.Namespace) -> None:
    config = preset(options)
    if not 1 <= options.documents <= (config.data.seq_len if config.data.mask_documents else 1):
        raise UserError(
            f"--documents {options.documents}: a row of {config.data.seq_len} tokens has from one document to one a"
            " token, and with data.mask_documents=false it is one"
        )
    table = Table("step", options.out)
    rows = {
        config.name: lambda: our_step(config, options.profile, documents=options.documents),
        "transformer++ compiled": lambda: timed(transformer_training(config), config, options.profile),
        "composition of existing parts, compiled": lambda: composition_step(config, options.profile),
    }
    for name, measure in rows.items():
        if not options.only or any(part in name for part in options.only):
            table.attempt(name, measure)
    table.ratios(config.name, "tokens/s")


def our_step(config: Config, profiled: bool, repeats: int = 7, warm: int = 3, documents: int = 1) -> dict:
    """Our trainer's own engine and step."""
    began = time.perf_counter()
    training = our_training(config, documents)
    built = time.perf_counter() - began
    numbers = timed(training, config, profiled, repeats, warm) | {"build s": round(built, 1)}
    numbers["layers"] = training.layers
    losses = [result.loss for result in training.results]
    shares = training.engine.module.layer_metrics.of_gates(training.results[-1].layer_metrics, "selected")
    numbers["loss"] = f"{losses[0]:.3f} -> {losses[-1]:.3f}"
    if shares:
        numbers["selected"] = round(sum(shares) / len(shares), 3)
    return numbers


def our_training(config: Config, documents: int = 1) -> Training:
    """Model, engine and step as the training loop makes them; the gates' bias is set so that they select C."""
    from megatron_taipan.engine.build import accumulation, build_engine, capture_graphs
    from megatron_taipan.train.start import build_training_model
    from megatron_taipan.train.step import train_step

    device, groups = join_processes(config)
    with torch.device(device):
        model = build_training_model(config, groups, choose_operations(config))
    select_capacity(model, config)
    engine = build_engine(model, config, groups, device)
    graphs = ExitStack()
    try:
        layers = capture_graphs(model, config, device, graphs)
        print(layers, flush=True)
    except BaseException:
        Training(engine, lambda: None, [], graphs).end()  # frees the memory of what was recorded
        raise
    torch.manual_seed(groups.data_rank)  # the ranks of a tensor group see the same tokens, of a context group one row's
    batches = [random_batch(config, device, groups.context, documents)] * accumulation(config, groups.data_size)
    results: list[StepResult] = []

    def step() -> None:
        results.append(train_step(engine, batches, step=len(results), groups=groups, grad_clip=config.optim.grad_clip))

    return Training(engine, step, results, graphs, layers)


def random_batch(
    config: Config, device: torch.device, place: ContextParallel | None = None, documents: int = 1
) -> dict[str, torch.Tensor]:
    """A micro-batch of random tokens, each row one document, or several of equal length; with a place that rank's piece
    of the same rows, of one document."""
    rows, piece = config.train.micro_batch, config.parallel.piece(config.data.seq_len)
    tokens = torch.randint(0, config.model.vocab_size, (rows, config.data.seq_len + 1), device=device)
    if place is not None:
        tokens = tokens[:, place.rank * piece :][:, : piece + 1]
    labels = tokens[:, 1:].contiguous()
    document = torch.arange(labels.shape[1], device=device) * documents // labels.shape[1]  # [l]
    batch = {
        "tokens": tokens[:, :-1].contiguous(), "labels": labels, "seq_idx": document.int().repeat(rows, 1),
        "loss_mask": torch.ones(labels.shape, device=device), "sample": torch.arange(rows, device=device),
    }  # fmt: skip
    if place is not None:
        batch["document_start"] = torch.zeros(rows, dtype=torch.int64, device=device)
    return batch


def select_capacity(model: torch.nn.Module, config: Config) -> None:
    """Makes every gate select about C of the tokens, as a trained one does: weight 0, bias log(C / (1 - C))."""
    capacity = min(max(config.model.gate.final_capacity, 1e-6), 1 - 1e-6)
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            torch.nn.init.zeros_(parameter)
        if name.endswith("gate.bias"):
            with torch.no_grad():
                parameter.copy_(torch.tensor([0.0, capacity / (1 - capacity)], device=parameter.device))
                parameter[1].log_()


def transformer_training(config: Config) -> Training:
    """Transformer++, compiled as one graph."""
    return peer_training(peers.make_transformer, config, torch.nn.Module.compile)


def composition_step(config: Config, profiled: bool) -> dict:
    """The composition, its kernels' candidates compiled beforehand."""
    seconds = compile_ahead(config.model.d_model, config.train.micro_batch, config.data.seq_len)
    return timed(composition_training(config), config, profiled) | {"compiled ahead s": round(seconds, 1)}


def composition_training(config: Config) -> Training:
    """The composition of existing parts, compiled by regions."""
    length = config.data.seq_len
    build = lambda model: peers.make_composition(model, length)  # noqa: E731
    return peer_training(build, config, peers.Stack.compile_regions)


def peer_training(build: Callable, config: Config, compile_it: Callable[[Any], Any]) -> Training:
    """A peer through DeepSpeed with the same settings as ours, including our faster reductions."""
    import deepspeed

    from megatron_taipan.engine.build import accumulation, count_parameters, deepspeed_config
    from megatron_taipan.engine.mpu import ModelParallelUnit
    from megatron_taipan.engine.optimizer import make_optimizer
    from megatron_taipan.engine.zero import patch_zero12

    device, groups = join_processes(config)
    with torch.device(device):
        model = build(config.model).to(torch.bfloat16)
    optimizer = make_optimizer([{"params": list(model.parameters()), "weight_decay": 0.01}], config.optim, on_gpu=True)
    settings = deepspeed_config(config, groups, count_parameters(model))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=ModelParallelUnit(groups))
    engine.optimizer.check_grad_overflow = True
    patch_zero12(engine.optimizer)
    compile_it(model)
    batch = random_batch(config, device)

    def step() -> None:
        for _ in range(accumulation(config, groups.data_size)):
            engine.backward(engine(batch["tokens"], batch["labels"]))
            engine.step()  # updates after the last

    return Training(engine, step, [])


def timed(training: Training, config: Config, profiled: bool, repeats: int = 7, warm: int = 3) -> dict:
    """First step, median, tokens per second and peak memory; the engine is destroyed afterwards, whatever happens."""
    try:
        began = time.perf_counter()
        training.step()
        torch.cuda.synchronize()
        numbers = step_numbers(training.step, config, time.perf_counter() - began, repeats, warm)
        if profiled:
            print_profile(training.step)
    finally:
        training.end()
    return numbers


def print_profile(step: Callable[[], None], top: int = 45, host: bool = True) -> None:
    """One step's kernels, then where the CPU spent another one."""
    for name, ms in kernel_times(step, top).items():
        print(f"    {ms:9.3f}  {name}", flush=True)
    if not host:
        return
    profile = cProfile.Profile()
    profile.runcall(step)
    pstats.Stats(profile, stream=sys.stdout).sort_stats("tottime").print_stats(25)


def step_numbers(step: Callable[[], None], config: Config, first: float, repeats: int = 7, warm: int = 3) -> dict:
    torch.cuda.reset_peak_memory_stats()
    retries = allocation_retries()
    ms = median_step_ms(step, repeats, warm)
    tokens = config.train.global_batch * config.data.seq_len
    peak = torch.cuda.max_memory_reserved() / 2**30  # recorded graphs are in no count of live tensors
    numbers = {
        "ms": round(ms, 1),
        "tokens/s": round(tokens / ms * 1e3),
        "GiB": round(peak, 1),
        "first step s": round(first, 1),
    }
    if retries := allocation_retries() - retries:
        numbers["allocations retried"] = retries
    return numbers


def allocation_retries() -> int:
    """How often torch found no memory and gave its free blocks back first: such a step waits for the GPU."""
    return torch.cuda.memory_stats().get("num_alloc_retries", 0)
