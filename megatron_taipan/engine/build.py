"""The DeepSpeed engine: built from the run's configuration, with float32 parameters inside low-precision training.

DeepSpeed (0.19) casts every parameter as soon as `bf16.enabled` is set, and asks no module about exceptions. So the
model is cast by its own rule *before* DeepSpeed sees it, and bf16 stays switched off there: ZeRO 1, 2 and 3 then keep
a float32 master of every parameter, whatever its own type, as long as no parameter group mixes two types.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from megatron_taipan.config import Config
from megatron_taipan.engine.mpu import ModelParallelUnit
from megatron_taipan.engine.muon import bring_matrices
from megatron_taipan.engine.operations import check_operations
from megatron_taipan.engine.optimizer import make_optimizer
from megatron_taipan.engine.protocol import Engine
from megatron_taipan.engine.startup import import_deepspeed
from megatron_taipan.engine.zero import patch_zero12
from megatron_taipan.errors import UserError
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.optim_config import OptimConfig
from megatron_taipan.parallel.groups import Groups
from megatron_taipan.parallel.mesh import fit_mesh
from megatron_taipan.parallel.pieces import refuse_unfit_pieces
from megatron_taipan.parallel.stages import stage_bounds
from megatron_taipan.param_spec import ParamSpec
from megatron_taipan.parameters import check_tensor_size, parameter_table
from megatron_taipan.stages import Stage, plan_stages

MAX_BUCKET = 100_000_000  # elements gathered or reduced at once; more no longer raises the bandwidth
# Elements of a micro-batch's stream on a rank from which on Python launches kernels well ahead of the GPU: a row of
# 65,536 tokens of taipan_1.3b, where graphs held 8 GiB and saved nothing on an H200 (docs/performance.md). Fewer
# elements, narrower models, other families and tensor parallelism, which divides a kernel's work, were not compared.
SLOWER_THAN_LAUNCHES = 65_536 * 2_048


def build_engine(model: nn.Module, config: Config, groups: Groups, device: torch.device) -> Engine:
    """The DeepSpeedEngine that trains `model` (parameters float32, on any device).

    Raises:
        UserError: the device cannot compute in the configured precision.
    """
    deepspeed = import_deepspeed(device)
    cast(model, config.train.precision, device)
    table = parameter_table(config.model, config.parallel.tensor)
    on_gpu = device.type == "cuda" and config.parallel.offload_optimizer == "none"
    optimizer = make_optimizer(parameter_groups(model, table, config), config.optim, on_gpu=on_gpu)
    with _allow_fp32_params(config):
        engine, *_ = deepspeed.initialize(
            model=model.to(device),
            optimizer=optimizer,
            config=deepspeed_config(config, groups, count_parameters(model)),
            mpu=ModelParallelUnit(groups) if groups.pipeline_size == 1 else None,  # a pipeline has its own
        )
    if config.parallel.zero_stage:
        # off by default in this mode: a step with an infinite or undefined gradient is then skipped on all ranks
        engine.optimizer.check_grad_overflow = True
        patch_zero12(engine.optimizer, pipeline=groups.pipeline_size > 1)
    if groups.pipeline_size > 1:
        # imports DeepSpeed, which is imported late on purpose
        from megatron_taipan.engine.pipeline_engine import patch_pipeline

        patch_pipeline(engine)
    if config.optim.name == "muon":
        bring_matrices(engine, config, groups, table)
    return engine


def capture_graphs(model: Any, config: Config, device: torch.device, stack: ExitStack) -> str:
    """Records the layers' CUDA graphs where they can be used; call it once nothing will move the parameters.

    Args:
        stack: releases them when it is left, which must be before the process groups are.

    Returns:
        What was done, or why not, for the log.
    """
    p, t = config.parallel, config.train
    tokens = t.micro_batch * p.piece(config.data.seq_len)
    reasons = {
        "no GPU": device.type != "cuda",
        "train.cuda_graphs=false": not t.cuda_graphs,
        "pipeline parallel": p.pipeline > 1,
        # at the other stages, and in fp32, DeepSpeed keeps gradient tensors that the next replay would overwrite
        f"zero_stage={p.zero_stage}": p.zero_stage != 1,
        f"precision={t.precision}": t.precision == "fp32",
        "train.deterministic": t.deterministic,
        model.ops.unrecordable: bool(model.ops.unrecordable),
        "reference operations": not model.graphable,
        # the last, since `true` would change nothing where another holds
        f"train.cuda_graphs=auto: with {tokens:,} tokens a micro-batch on a rank they save no time, and hold memory": (
            t.cuda_graphs == "auto" and tokens * config.model.d_model >= SLOWER_THAN_LAUNCHES * p.tensor
        ),
    }
    reason = next((text for text, holds in reasons.items() if holds), None)
    if reason is not None:
        return f"layers run one by one ({reason})"
    stack.callback(model.release_graphs)
    try:
        model.capture(t.micro_batch, p.piece(config.data.seq_len))
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"recording the layers on {t.micro_batch} x {config.data.seq_len} tokens ran out of memory on"
            f" {torch.cuda.get_device_name(device)}: {str(error).splitlines()[0]} Lower train.micro_batch, or use"
            " parallel.recompute_mixer=[states,conv], parallel.recompute=selective or full;"
            " train.cuda_graphs=false needs less, above all with long rows"
        ) from error
    return f"layers run as {len(model.graphs.groups)} CUDA graphs"


def cast(model: nn.Module, precision: str, device: torch.device) -> None:
    """Casts the parameters to the compute precision in place; the model itself keeps its float32 parameters."""
    if precision == "fp16" and device.type == "cpu":
        raise UserError("train.precision=fp16 needs a GPU; on a CPU use bf16 or fp32")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError(f"{torch.cuda.get_device_name(device)} has no bf16; use train.precision=fp16 or fp32")
    if precision == "bf16":
        model.bfloat16()
    elif precision == "fp16":
        model.half()


def parameter_groups(model: nn.Module, table: dict[str, ParamSpec], config: Config) -> list[dict[str, Any]]:
    """The optimizer's groups: by weight decay, factor of the learning rate and whether Muon steps them, and never two
    types in one group.

    The first group's type is what DeepSpeed takes for *the* type. At stage 1 it has to be the low one, so that
    gradients are summed over micro-batches in float32; at stage 2 under bf16 it has to be float32, so that the float32
    parameters' gradients are not rounded when they are sent. At stage 3 either works.
    """
    groups: dict[tuple[torch.dtype, float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        spec = _row(table, name)
        muon = config.optim.name == "muon" and spec.is_matrix
        decay, factor = treatment(name, spec.decay, config.optim)
        if spec.is_matrix or spec.wide:  # muP; the product of rate and decay stays
            decay, factor = decay * config.model.times_as_wide, factor / config.model.times_as_wide
        groups.setdefault((parameter.dtype, decay, factor, muon), []).append(parameter)
    float32_first = config.parallel.zero_stage == 2 and config.train.precision == "bf16"

    def order(key: tuple[torch.dtype, float, float, bool]) -> tuple[bool, float, float, bool]:
        dtype, decay, factor, muon = key
        return ((dtype == torch.float32) != float32_first, -decay, -factor, muon)

    return [
        {"params": groups[key], "weight_decay": key[1], "lr_factor": key[2], "muon": key[3]}
        for key in sorted(groups, key=order)
    ]


def treatment(name: str, decays: bool, optim: OptimConfig) -> tuple[float, float]:
    """Weight decay, and factor of the learning rate, of a parameter.

    Args:
        decays: whether it has weight decay by the parameter table.
    """
    decay = optim.weight_decay if decays else 0.0
    group = next((group for group in optim.groups if fnmatchcase(name, group.match)), None)
    if group is None:
        return decay, 1.0
    return decay if group.weight_decay is None else group.weight_decay, group.lr


def describe_width(config: ModelConfig) -> list[str]:
    """What model.mup_base_width does, for the log; nothing without it."""
    if config.mup_base_width is None:
        return []
    rate = 1 / config.times_as_wide
    return [
        f"muP: {config.times_as_wide:g} times the width {config.mup_base_width}: learning rate x {rate:g}, weight decay"
        f" x {config.times_as_wide:g} for matrices, gates and the final norm"
    ]


def describe_groups(optim: OptimConfig, names: Iterable[str]) -> list[str]:
    """What each of optim.groups does, and to how many of the whole network's parameters.

    Raises:
        UserError: one matches none, or none that an earlier one leaves.
    """
    names, told = list(names), []
    for group in optim.groups:
        mine = [name for name in names if fnmatchcase(name, group.match)]
        if not mine:
            raise UserError(
                f"optim.groups: match={group.match} matches no parameter that an earlier group leaves; names are such"
                f" as {', '.join(names[:2] + names[-2:])}"
            )
        names = [name for name in names if name not in mine]
        decay = "" if group.weight_decay is None else f", weight decay {group.weight_decay:g}"
        told.append(f"{group.match}: {len(mine)} parameters, learning rate x {group.lr:g}{decay}")
    return told


def deepspeed_config(config: Config, groups: Groups, n_params: int) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    p, t = config.parallel, config.train
    bucket = max(min(MAX_BUCKET, n_params), 1)
    bucket += bucket % 2  # DeepSpeed aligns its buckets to two elements
    zero: dict[str, Any] = {
        "stage": p.zero_stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        "stage3_prefetch_bucket_size": bucket,
        "overlap_comm": torch.cuda.is_available(),
        "memory_efficient_linear": False,  # it replaces torch's linear for the whole process
    }
    if p.offload_optimizer != "none":
        zero["offload_optimizer"] = {"device": p.offload_optimizer}
    if p.offload_param != "none":
        zero["offload_param"] = {"device": p.offload_param}
    result: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": t.micro_batch,
        "gradient_accumulation_steps": accumulation(config, groups.data_size),
        # at stage 0 train/step.py clips: DeepSpeed's own way there fails when a step is skipped
        "gradient_clipping": config.optim.grad_clip if p.zero_stage else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU before every forward pass
        # the other tensors of the tuple between stages need gradients too, so no tensor of it is partitioned
        "pipeline": {"pipe_partitioned": False, "grad_partitioned": False},
    }
    if t.precision == "fp16":
        result["fp16"] = {"enabled": True, "initial_scale_power": 16}
    return result


def check_layout(config: Config, processes: int) -> None:
    """Whether the configuration fits that many processes; needs no process group.

    Raises:
        UserError: with the arithmetic.
    """
    p = config.parallel
    accumulation(config, fit_mesh(processes, p).data)
    check_tensor_size(config.model, p.tensor)
    check_operations(config)
    if p.pipeline > 1:
        stage_bounds([1.0] * config.model.n_layers, config.model.cuts, p.pipeline)
    check_pieces(config)
    piece = p.piece(config.data.seq_len)
    if p.shards_tokens(config.data.seq_len) and piece % p.tensor:
        raise UserError(
            f"parallel.sequence needs {_tokens_of_a_piece(config)} to be a multiple of parallel.tensor={p.tensor}"
            f" (remainder {piece % p.tensor})"
        )
    for name, where in (("offload_optimizer", p.offload_optimizer), ("offload_param", p.offload_param)):
        if where == "nvme":
            raise UserError(
                f"parallel.{name}=nvme: DeepSpeed would keep that in its own files, which no checkpoint here holds, so"
                f" the run would end at its first save; use {name}=cpu, or more ranks with zero_stage=3 or tensor"
            )
    if p.offload_param != "none" and p.zero_stage != 3:
        raise UserError(f"parallel.offload_param={p.offload_param} needs zero_stage=3, not {p.zero_stage}")
    if p.offload_optimizer != "none" and p.zero_stage == 0:
        raise UserError(f"parallel.offload_optimizer={p.offload_optimizer} needs zero_stage 1, 2 or 3, not 0")


def check_pieces(config: Config) -> None:
    """Whether rows can be shared out over parallel.context ranks.

    Raises:
        UserError: they cannot, with the arithmetic.
    """
    p, length = config.parallel, config.data.seq_len
    if p.context == 1:
        return
    refuse_unfit_pieces(config.model, length, p.context, rows="data.seq_len", ranks="parallel.context")
    if p.pipeline > 1:
        raise UserError(
            f"parallel.context={p.context} needs parallel.pipeline=1, not {p.pipeline}: DeepSpeed's pipeline engine"
            " lays out its ranks by pipeline, data and tensor alone, and knows no pieces of rows"
        )


def accumulation(config: Config, data_size: int) -> int:
    """Micro-batches per step of one rank.

    Raises:
        UserError: the global batch is not a multiple of micro_batch times the data-parallel size.
    """
    t = config.train
    if t.global_batch % (t.micro_batch * data_size):
        raise UserError(
            f"train.global_batch={t.global_batch} is not a multiple of train.micro_batch={t.micro_batch} x {data_size}"
            f" data-parallel ranks = {t.micro_batch * data_size} (remainder"
            f" {t.global_batch % (t.micro_batch * data_size)})"
        )
    return t.global_batch // (t.micro_batch * data_size)


def check_stages(config: Config, processes: int) -> None:
    """Whether every stage of a run fits that many processes, and one engine can run them after each other.

    Raises:
        UserError: as for `check_layout`, naming the stage; or a stage changes what the engine is built with.
    """
    if not config.stages:
        return check_layout(config, processes)
    first, *others = plan_stages(config)
    for stage in (first, *others):
        try:
            check_layout(stage.config, processes)
        except UserError as error:
            raise UserError(f"{stage.title()}: {error}") from error
    for stage in others:
        p, sharded = config.parallel, [s.config.parallel.shards_tokens(s.config.data.seq_len) for s in (first, stage)]
        if sharded[0] != sharded[1]:
            unfit, fit = (stage, first) if sharded[0] else (first, stage)
            raise UserError(
                f"{unfit.title()}: {_tokens_of_a_piece(unfit.config)} cannot be shared out over"
                f" parallel.tensor={p.tensor} ranks (remainder"
                f" {unfit.config.parallel.piece(unfit.config.data.seq_len) % p.tensor}) and {fit.title()}:"
                f" {_tokens_of_a_piece(fit.config)} can, and groups of ranks are made once; take a multiple, or set"
                " parallel.sequence=false"
            )
        if p.pipeline > 1 and (changed := _fixed_in_a_pipeline(first, stage)):
            raise UserError(
                f"{stage.title()} changes {', '.join(changed)}, and with parallel.pipeline={p.pipeline} the stages of"
                " the pipeline are cut, and have buffers, for one shape; keep it, or use parallel.pipeline=1"
            )


def _tokens_of_a_piece(config: Config) -> str:
    """Tokens of a row that a rank's pieces have, for messages: `data.seq_len=34`, or with the division."""
    p, length = config.parallel, config.data.seq_len
    if p.context == 1:
        return f"data.seq_len={length}"
    return f"data.seq_len={length} / parallel.context={p.context} = {p.piece(length)}"


def _fixed_in_a_pipeline(first: Stage, stage: Stage) -> list[str]:
    names = {
        "data": ("seq_len", "mask_documents"),
        "train": ("global_batch", "micro_batch"),
        "parallel": ("recompute", "recompute_every"),
    }
    pairs = [(section, name) for section, options in names.items() for name in options]
    return [
        f"{section}.{name}"
        for section, name in pairs
        if len({getattr(getattr(s.config, section), name) for s in (first, stage)}) > 1
    ]


def change_stage(
    engine: Engine, before: Config, config: Config, groups: Groups, device: torch.device, stack: ExitStack
) -> str:
    """Lets an engine go on with another stage's batch, shapes, recomputation and schedules; parameters, moments and
    the loss scale stay. Between two steps.

    Args:
        before, config: of the stage that is done, and of the one that begins.
        groups: in the stage that begins.

    Returns:
        What was done about the layers' graphs, which are captured again where shapes change; "" where nothing was.
    """
    network: Any = engine.module
    network.use_gate(config.model.gate)
    if groups.pipeline_size > 1:
        return ""
    set_batch(engine, config.train.micro_batch, accumulation(config, groups.data_size), config.train.global_batch)
    network.recompute, network.recompute_every = config.parallel.recompute, config.parallel.recompute_every
    network.use_context(groups.context)
    shapes = [(c.train.micro_batch, c.data.seq_len, c.parallel.context, c.parallel.recompute,
               c.parallel.recompute_every) for c in (before, config)]  # fmt: skip
    if shapes[0] == shapes[1]:
        return ""
    network.release_graphs()
    return capture_graphs(network, config, device, stack)


def set_batch(engine: Any, micro_batch: int, micro_batches: int, global_batch: int) -> None:
    """Tells DeepSpeed another batch. Its own setters allow one size to change at a time and check against the other;
    it counts micro-batches from the start of the run, and ends a step where the count is a multiple of a step's."""
    settings = engine._config
    settings.train_micro_batch_size_per_gpu = micro_batch
    settings.gradient_accumulation_steps = micro_batches
    settings.train_batch_size = global_batch
    engine.micro_steps = 0
    if engine.zero_optimization_stage():
        engine.optimizer.gradient_accumulation_steps = micro_batches


def count_parameters(model: nn.Module) -> int:
    """Elements of all parameters on this rank."""
    return sum(p.numel() for p in model.parameters())


def set_learning_rate(engine: Engine, lr: float) -> None:
    """Sets the rate of the next optimizer step in every group, times the group's factor."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def _row(table: dict[str, ParamSpec], name: str) -> ParamSpec:
    if name not in table:
        raise KeyError(f"parameter {name} is missing from parameters.parameter_table: add a row for it")
    return table[name]


@contextmanager
def _allow_fp32_params(config: Config) -> Iterator[None]:
    """Replaces the two places in DeepSpeed that require one parameter type, while the engine is built.

    Stage 3 copies all partitions into one flat buffer and asserts that they have one type; fp16 (needed for its loss
    scaler) casts every parameter.
    """
    import deepspeed.runtime.engine as engine
    import deepspeed.runtime.zero.stage3 as stage3
    from deepspeed.accelerator import get_accelerator

    whole_stage3 = stage3.DeepSpeedZeroOptimizer_Stage3

    class Stage3WithFp32Params(whole_stage3):
        """Partitions of the main type share one flat buffer, as before; each group of another type has its own."""

        def _get_parameter_partitions(self):
            return [t for t in super()._get_parameter_partitions() if t.dtype == self.dtype]

        def _set_fp16_partitioned_groups_flat(self):
            offset = 0
            for group in self.fp16_groups:
                size = sum(p.partition_numel() for p in group)
                if group[0].ds_tensor.dtype == self.dtype:
                    flat, offset = self.lp_param_buffer.narrow(0, offset, size), offset + size
                else:
                    flat = stage3.defragment([p.ds_tensor for p in group])
                self.fp16_partitioned_groups_flat.append(flat)

        def _create_param_groups_fp16_flat_cpu_memory(self):
            """With offload_param each group has a flat buffer, which rounded every group to the main type."""
            super()._create_param_groups_fp16_flat_cpu_memory()
            buffers = self.param_groups_fp16_flat_cpu_memory
            for at, group in enumerate(self.trainable_param_groups):
                dtype = group["params"][0].ds_tensor.dtype
                if buffers[at].dtype != dtype:
                    buffers[at] = get_accelerator().pin_memory(torch.empty(buffers[at].shape, dtype=dtype))

    cast_all = engine.DeepSpeedEngine._cast_module_mixed_precision
    stage3.DeepSpeedZeroOptimizer_Stage3 = Stage3WithFp32Params
    engine.DeepSpeedEngine._cast_module_mixed_precision = lambda self, *args, **kwargs: None
    try:
        yield
    finally:
        stage3.DeepSpeedZeroOptimizer_Stage3 = whole_stage3
        engine.DeepSpeedEngine._cast_module_mixed_precision = cast_all
