"""One optimizer step: micro-batches forward and backward, the update, and what happened, agreed on by all ranks."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_taipan.engine.protocol import Engine, layer_metrics, norm_and_skipped
from megatron_taipan.engine.readback import Readback, send
from megatron_taipan.layer_kinds.metrics import LayerMetrics, metric_name
from megatron_taipan.model.stack import training_loss
from megatron_taipan.parallel.groups import Groups
from megatron_taipan.parallel.tensor import TensorParallel
from megatron_taipan.train.schedule import GateStep

Batch = dict[str, Tensor]


@dataclass
class StepResult:
    """The results of one step; the same numbers on every rank."""

    loss: float  # ce + budget_lambda * budget
    ce: float  # mean cross entropy of the global batch's unmasked tokens, nats
    budget: float
    layer_metrics: dict[str, float]  # what the layers measured: "layers.5.selected", see layer_kinds/metrics.py
    grad_norm: float  # before clipping; inf where the step was skipped
    skipped: bool  # loss or gradient was not finite, so nothing was updated
    requests: list[bool] = field(default_factory=list)  # what any rank asked for, see train_step


def train_step(
    engine: Engine,
    batches: list[Batch],
    *,
    step: int,
    groups: Groups,
    grad_clip: float,
    gate: GateStep | None = None,
    requests: list[bool] | None = None,
) -> StepResult:
    """Trains on one global batch.

    Args:
        batches: this rank's micro-batches, each a dict of [b, l] tensors on its device.
        step: steps taken before this one; a counter of the gate's noise.
        grad_clip: largest gradient norm, 0 for no limit; applied here at ZeRO 0, by DeepSpeed at the other stages.
        gate: settings of the gates; None: the final values of the configuration's schedules.
        requests: flags that a rank may raise (stop, save now, ...). Each comes back true where any rank raised it, so
            that all ranks act at the same step. They are reduced with the losses: one small all-reduce a step in all.
    """
    scale = cross_entropy_scale(batches, groups)
    flags = send(requests or [], scale.device)
    settings = None if gate is None else send(gate.vector(), scale.device).float()
    if groups.pipeline_size > 1:
        numbers, norm, skipped = _run_stages(engine, batches, step, scale, settings, flags)
    else:
        numbers, norm, skipped = _run_whole(engine, batches, step, scale, settings, flags, groups, grad_clip)

    values = numbers.read()
    means, raised = values.split([len(values) - len(flags), len(flags)])
    # each entry comes from one stage: all its data and tensor ranks
    loss, ce, budget, *values = (means / groups.mesh.size("data", "context", "tensor")).tolist()
    names = layer_metrics(engine)
    measured = names.named(values)
    if gate is not None and gate.budget != "row":  # not a micro-batch's own budget: the batch's, by the shares of all
        measured = with_batch_budget(names, measured, gate.capacity, gate.budget)
        budget = sum(names.of_gates(measured, "budget"))
        loss = training_loss(ce, budget, gate.budget_lambda)
    requested = (raised > 0).tolist()
    return StepResult(loss, ce, budget, measured, grad_norm=norm, skipped=skipped, requests=requested)


def _run_stages(
    engine: Engine, batches: list[Batch], step: int, scale: Tensor, gate: Tensor | None, flags: Tensor
) -> tuple[Readback, float, bool]:
    """The step through pipeline stages: `_share` of this stage's means, gradient norm, skipped."""
    from megatron_taipan.engine.pipeline import run_pipeline, staged

    means = run_pipeline(staged(engine), batches, step=step, ce_scale=scale, gate=gate)
    return _share(means, flags), *norm_and_skipped(engine)


def _run_whole(
    engine: Engine,
    batches: list[Batch],
    step: int,
    scale: Tensor,
    gate: Tensor | None,
    flags: Tensor,
    groups: Groups,
    grad_clip: float,
) -> tuple[Readback, float, bool]:
    """The step where every rank holds all layers: `_share` of the means, gradient norm, skipped."""
    sums = None
    for number, batch in enumerate(batches, 1):
        out = engine(
            batch["tokens"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
            seq_idx=batch["seq_idx"],
            samples=batch["sample"],
            document_start=batch.get("document_start"),
            step=step,
            ce_scale=scale,
            gate=gate,
        )
        engine.backward(out.loss)
        values = collect(out)
        sums = values if sums is None else sums + values
        if engine.zero_optimization_stage() == 0 and engine.is_gradient_accumulation_boundary():
            norm = clip_gradients(engine.module, groups.tensor, grad_clip)
        if number == len(batches):
            numbers = _share(sums / len(batches), flags)  # before the update, so that reading does not wait for it
        engine.step()

    if engine.zero_optimization_stage() == 0:
        return numbers, norm, not math.isfinite(norm)
    return numbers, *norm_and_skipped(engine)


def _share(means: Tensor, flags: Tensor) -> Readback:
    """[loss, ce, budget, layers' metrics, flags] float64, summed over all ranks: on its way to the host."""
    everything = torch.cat([means, flags])
    dist.all_reduce(everything)
    return Readback(everything)


def with_batch_budget(
    names: LayerMetrics, measured: dict[str, float], capacity: float, budget: str
) -> dict[str, float]:
    """The metrics with the budget loss of the batch that `selected` was measured on, or the layers' shares of it; as
    they are where no layer has a gate."""
    shares = names.of_gates(measured, "selected")
    if not shares:
        return measured
    if budget == "batch":
        losses = [(capacity - share) ** 2 for share in shares]
    else:
        losses = [(capacity - sum(shares) / len(shares)) ** 2 / len(shares)] * len(shares)
    return measured | {metric_name(i, "budget"): loss for i, loss in zip(names.gated, losses, strict=True)}


def cross_entropy_scale(batches: list[Batch], groups: Groups) -> Tensor:
    """The factor of each micro-batch's summed cross entropy that makes the loss independent of the layout.

    DeepSpeed averages gradients over micro-batches and data-parallel ranks. A mean over each micro-batch's own
    unmasked tokens would weigh a token by how many unmasked neighbours it happens to have; so the sum is divided by
    the count of the whole global batch instead, and multiplied by what DeepSpeed will divide by.

    Ranks along data and context each hold some of these tokens.
    """
    count = torch.stack([batch["loss_mask"].sum(dtype=torch.float64) for batch in batches]).sum()
    dist.all_reduce(count, group=groups.zero_group)
    return (len(batches) * groups.zero_size / count.clamp(min=1)).float()


def collect(out: Any) -> Tensor:
    """[loss, ce, budget, the layers' metrics] as one float64 vector, detached."""
    losses = torch.stack([out.loss, out.ce_loss, out.budget_loss]).detach().double()
    return losses if out.metrics is None else torch.cat([losses, out.metrics.double()])


def clip_gradients(model: nn.Module, tensor: TensorParallel, largest: float) -> float:
    """Scales the gradients down to a global norm of `largest` (0: no limit) and returns the norm before.

    Where the norm is not finite the gradients are dropped, so that the update does nothing. Parameters that every
    tensor rank holds count once. Only for ZeRO 0, where DeepSpeed neither reports the norm nor looks for infinities.
    """
    pairs = [(p, p.grad) for p in model.parameters() if p.grad is not None]
    device = pairs[0][0].device
    whole = torch.zeros((), dtype=torch.float64, device=device)
    split = torch.zeros((), dtype=torch.float64, device=device)
    for p, grad in pairs:
        square = torch.linalg.vector_norm(grad.float()).double().square()
        if getattr(p, "tensor_model_parallel", False):
            split += square
        else:
            whole += square
    if tensor.size > 1:
        dist.all_reduce(split, group=tensor.group)
    norm = float((whole + split).sqrt())
    for p, grad in pairs:
        if not math.isfinite(norm):
            p.grad = None
        elif largest and norm > largest:
            grad.mul_(largest / (norm + 1e-6))
    return norm
