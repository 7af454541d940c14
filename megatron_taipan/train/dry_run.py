"""What a configuration would do, determined on the meta device: no GPU, no memory, no other process."""

from collections.abc import Iterator
from itertools import pairwise

import torch

from megatron_taipan.checkpoint.metadata import read_metadata
from megatron_taipan.checkpoint.stages import likely_checkpoint, stages_done
from megatron_taipan.checkpoint.verification import refuse_load
from megatron_taipan.config import Config
from megatron_taipan.data.checksums import Verification
from megatron_taipan.data.loader import build_dataset
from megatron_taipan.engine.build import accumulation, count_parameters, describe_groups, describe_width
from megatron_taipan.engine.muon import describe_muon
from megatron_taipan.engine.operations import describe_operations
from megatron_taipan.engine.state_shards import kinds_of
from megatron_taipan.model.flops import pipeline_bounds
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.parallel.context_traffic import describe_pieces
from megatron_taipan.parallel.mesh import ZERO, fit_mesh
from megatron_taipan.parallel.tensor import TensorParallel
from megatron_taipan.parameters import parameter_table
from megatron_taipan.stages import describe_stage, plan_stages
from megatron_taipan.train.schedule import describe_gate
from megatron_taipan.train.schedule_plot import schedule_plots
from megatron_taipan.train.shortfalls import shortfalls
from megatron_taipan.train.tasks import describe_tasks
from megatron_taipan.versions import untried_torch


def dry_run(config: Config, processes: int) -> Iterator[str]:
    """Builds and checks everything for that many processes; yields the report line by line, the data last.

    Raises:
        UserError: the layout, the data or checkpoint.load do not fit.
    """
    p, t = config.parallel, config.train
    mesh = fit_mesh(processes, p)
    with torch.device("meta"):
        place = TensorParallel(p.tensor, 0, None, p.shards_tokens(config.data.seq_len))
        model = Taipan(config.model, seed=t.seed, tensor_parallel=place)
    here = largest_stage(model, config)
    plan = plan_stages(config)
    tokens = sum(stage.steps * stage.tokens_per_step for stage in plan)
    flops = model.num_flops_per_token(config.data.seq_len)
    yield (
        f"model      {config.name}: {config.model.n_layers} layers {config.model.pattern}, d_model"
        f" {config.model.d_model}, {model.num_params():,} parameters, {flops / 1e9:.3g} GFLOP per token forward"
    )
    sharded = " (tokens sharded)" if place.sequence_parallel else ""
    pieces = f" x {mesh.context} context" if mesh.context > 1 else ""
    yield (
        f"layout     {processes} processes = {mesh.data} data{pieces} x {mesh.tensor} tensor{sharded} x {mesh.pipeline}"
        f" pipeline, ZeRO {p.zero_stage}, {t.precision}, recompute {p.recompute}"
    )
    yield (
        f"per rank   {'at most ' if p.pipeline > 1 else ''}{here:,} parameters; parameters, gradients and optimizer"
        f" state {state_bytes(here, mesh.size(*ZERO), config) / 1e9:.2f} GB, activations not counted"
    )
    operations = sum(
        3 * model.num_flops_per_token(stage.config.data.seq_len) * stage.steps * stage.tokens_per_step for stage in plan
    )
    if not config.stages:
        yield f"batch      {batch(config, mesh.data)}"
    yield f"run        {t.steps:,} steps = {tokens:,} tokens, {operations:.3g} FLOP forward and backward"
    for stage in plan if config.stages else ():
        yield describe_stage(stage)
        yield f"batch      {stage.title()} {batch(stage.config, fit_mesh(processes, stage.config.parallel).data)}"
    for stage in plan:
        of_stage = fit_mesh(processes, stage.config.parallel)
        if of_stage.context > 1:
            where = f"{stage.title()} " if config.stages else ""
            yield f"pieces     {where}{describe_pieces(stage.config, accumulation(stage.config, of_stage.data))}"
    yield f"kernels    {describe_operations(*(stage.config for stage in plan))}"
    step, run_steps = 0, t.steps
    refuse_load(config)
    if path := likely_checkpoint(config):
        progress = read_metadata(path)["progress"]
        step, run_steps = progress["step"], progress.get("run_steps") or t.steps
        yield f"goes on    from {path}: {max(t.steps - step, 0):,} steps are left"
    table = parameter_table(config.model)
    for line in (
        *describe_muon(config.optim, table),
        *describe_width(config.model),
        *describe_groups(config.optim, table),
    ):
        yield f"optimizer  {line}"
    for stage in plan:
        where = f"{stage.title()} " if config.stages else ""
        if config.model.gated_layers and (gates := describe_gate(stage.config.model.gate, run_steps, stage)):
            yield f"gate       {where}{gates}"
        for line in schedule_plots(stage, run_steps):
            yield f"schedule   {where}{line}"
    for line in describe_tasks(config):
        yield f"task       {line}"
    for warning in (*untried_torch(torch.__version__), *shortfalls(config, step, run_steps)):
        yield f"warning    {warning}"
    left = plan[stages_done(config) :]  # the data of those that are done need not be there
    for stage in left if config.data.verify else ():
        verification = Verification(stage.config.data)
        while verification.unfinished:
            verification.go_on()
        yield f"checked    {verification.report()}"
    for stage in left:
        where = f"{stage.title()} " if config.stages else ""
        data = stage.config.data
        samples = stage.steps * stage.config.train.global_batch
        train_data = build_dataset(data, "train", config.model.vocab_size)
        yield (
            f"data       {where}{len(train_data):,} samples an epoch, so the {'stage' if config.stages else 'run'} is"
            f" {samples / len(train_data):.2f} epochs; fingerprint {train_data.fingerprint}"
        )
        yield f"sources    {where}{train_data.describe(data.train, samples)}"


def batch(config: Config, ranks: int) -> str:
    """The batch of a step and how it is spread over data-parallel ranks."""
    t, length = config.train, config.data.seq_len
    return (
        f"{t.global_batch} samples x {length} tokens = {t.global_batch * length:,} tokens a step:"
        f" {accumulation(config, ranks)} micro-batches of {t.micro_batch} on each of {ranks} data-parallel ranks"
    )


def largest_stage(model: Taipan, config: Config) -> int:
    """Parameters, on one tensor rank, of the pipeline stage that has most; without a pipeline, all of them."""
    stages = config.parallel.pipeline
    if stages == 1:
        return count_parameters(model)
    bounds = pipeline_bounds(config.model, config.data.seq_len, stages)
    counts = [sum(map(count_parameters, model.layers[first:stop])) for first, stop in pairwise(bounds)]
    head = model.embedding if config.model.tie_embeddings else model.head  # the last stage has a copy of a tied one
    counts[0] += count_parameters(model.embedding)
    counts[-1] += count_parameters(model.final_norm) + count_parameters(head)
    return max(counts)


def state_bytes(parameters: int, sharers: int, config: Config) -> float:
    """Bytes that one rank keeps through a step for `parameters` parameters, which ZeRO shards over `sharers` ranks.

    Parameters and gradients in the compute precision and in float32 respectively; the optimizer holds a float32 master
    and two moments, of what Muon steps one (its share of the whole network is taken for that of the rank).
    """
    stage, low = config.parallel.zero_stage, 4 if config.train.precision == "fp32" else 2
    weights = low / sharers if stage == 3 else low
    gradients = 4 / sharers if stage >= 2 else 4
    table = parameter_table(config.model)
    sizes = {name: torch.Size(spec.shape).numel() for name, spec in table.items()}
    kept = sum(len(kinds_of(table[name], config.optim)) * size for name, size in sizes.items()) / sum(sizes.values())
    state = 4 * (kept - 1) if stage == 0 else 4 * kept / sharers  # at stage 0 the weights are the master
    return parameters * (weights + gradients + state)
