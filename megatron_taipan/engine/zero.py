"""What is replaced in DeepSpeed's ZeRO optimizers of stages 1 and 2: the same results with few launches."""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_taipan.engine.readback import Readback
from megatron_taipan.engine.reduction import OverlappedReduction
from megatron_taipan.ops.copies import copy_all

TOGETHER = 2**24  # elements: gradients wait until they have so many (32 MiB in 16 bits), and are added up at once


def patch_zero12(optimizer: Any, *, pipeline: bool = False) -> None:
    """Replaces per-parameter loops of an optimizer of stage 1 or 2 in place; other optimizers stay as they are.

    - The search for infinities ran over every gradient of every parameter, and waited for the device; then came the
      norm, which shows the same: it is not finite where a gradient is not, and the step looks at it in any case.
    - The norm took three launches a parameter; now one kernel handles many.
    - At stage 1 each gradient went through a copy in float32, a bucket, an all-reduce even where one rank
      owned it or there was only one rank, a partition and a flat tensor: see `FlatGradients`.
    - There, in bf16, the host read the norm before it launched AdamW; now after that: see `QueuedStep`.

    With the optimizer's state offloaded only what is wrong there is replaced: see `forget_skipped_gradients`.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if not isinstance(optimizer, DeepSpeedZeroOptimizer):
        return
    if optimizer.cpu_offload:
        forget_skipped_gradients(optimizer)
    if optimizer.cpu_offload or not optimizer.compute_grad_norm:
        return
    optimizer.check_overflow = lambda partition_gradients=True: None
    optimizer.get_grad_norm_direct = lambda gradients, params, norm_type=2: grad_norm(optimizer, gradients, params)
    if optimizer.partition_gradients or pipeline or optimizer.has_moe_layers:
        return
    # one replica in float32 keeps its gradients where autograd adds them up
    if optimizer.use_grad_accum_attribute or dist.get_world_size(optimizer.dp_process_group) > 1:
        FlatGradients(optimizer)


def forget_skipped_gradients(optimizer: Any) -> None:
    """Lets an optimizer with offloaded state drop the gradients of a step that it skips.

    It kept their float32 sums, added the next step's to what is not finite, and skipped every step from there on.
    """
    reset = optimizer.reset_cpu_buffers  # called at the end of every step, a skipped one too

    def reset_cpu_buffers() -> None:
        reset()
        optimizer.averaged_gradients = dict.fromkeys(optimizer.averaged_gradients)

    optimizer.reset_cpu_buffers = reset_cpu_buffers


class FlatGradients:
    """float32 gradients, added up in the memory from which they are sent and from which the optimizer reads them.

    One flat tensor a parameter group has the layout of the group's flat weights. A parameter's hook takes its gradient,
    and those of many parameters are put there together: a step's first ones in a few launches, those of later
    micro-batches in one each. With several data ranks its ranges are averaged from there while the backward pass of the
    last micro-batch runs (`OverlappedReduction`), and the step takes this rank's slice: one pass over the gradients
    where there were seven. The factor of clipping and loss scaling is given to torch's fused AdamW, which applies it as
    it reads.

    Args:
        optimizer: DeepSpeed's, of stage 1; its methods that move gradients are replaced.
    """

    def __init__(self, optimizer: Any):
        self.optimizer = optimizer
        self.summed: set[nn.Parameter] = set()  # parameters whose sums hold a gradient of this step
        self.waiting: dict[nn.Parameter, Tensor] = {}  # gradients that are not added up yet
        self.n_waiting = 0  # elements of these
        self.views: dict[nn.Parameter, Tensor] = {}
        self.flat: list[Tensor] = []
        for weights, group in zip(optimizer.bit16_groups_flat, optimizer.bit16_groups, strict=True):
            flat = torch.zeros(weights.shape, dtype=torch.float32, device=weights.device)
            for p in group:
                first = (p.data_ptr() - weights.data_ptr()) // p.element_size()
                self.views[p] = flat[first : first + p.numel()].view(p.shape)
            self.flat.append(flat)
        size, rank = dist.get_world_size(optimizer.dp_process_group), dist.get_rank(optimizer.dp_process_group)
        self.reduction = None
        if size > 1:
            self.reduction = OverlappedReduction(
                self.flat, self.views, optimizer.bit16_groups, optimizer.param_names, optimizer.dp_process_group
            )
        self.partitions = [flat.view(size, -1)[rank] for flat in self.flat]  # this rank's
        self.owned = [
            [gradient_in_partition(self.views[p], partition) for p in group]
            for partition, group in zip(self.partitions, optimizer.params_in_partition, strict=True)
        ]
        optimizer.process_gradients = self.take
        self.end_backward, optimizer.backward_epilogue = optimizer.backward_epilogue, self.end_micro_batch
        optimizer.reduce_gradients = self.hand_over
        if isinstance(optimizer.optimizer, torch.optim.AdamW) and optimizer.optimizer.defaults.get("fused"):
            optimizer.unscale_and_clip_grads = self.leave_factor
            if optimizer.dtype == torch.bfloat16:  # fp16's loss scale is the host's; in fp32 DeepSpeed always reads
                QueuedStep(optimizer)

    def take(self, param: nn.Parameter, group: int) -> None:
        """Takes the gradient that a backward pass left on a parameter, to be added with others."""
        if param.grad is None:
            return
        if param in self.waiting:
            self.add_up()
        if self.reduction is not None and self.reduction.has_begun(param):
            raise RuntimeError(
                f"parameter {self.optimizer.param_names[param]} got another gradient after its sum was sent to other"
                " ranks: it must have one a micro-batch (checkpointing with use_reentrant=True gives it several), and"
                " engine.is_gradient_accumulation_boundary() must be true in a step's last micro-batch only"
            )
        self.waiting[param], param.grad = param.grad, None
        self.n_waiting += param.numel()
        if self.n_waiting >= TOGETHER:
            self.add_up()

    def add_up(self) -> None:
        """Adds the gradients that wait to the sums of their parameters."""
        new = [p for p in self.waiting if p not in self.summed]
        copy_all([self.views[p] for p in new], [self.waiting[p] for p in new])
        for p, grad in self.waiting.items():
            if p in self.summed:
                self.views[p].add_(grad)
        self.summed.update(new)
        if self.reduction is not None and self.optimizer.is_gradient_accumulation_boundary():
            for p in self.waiting:
                self.reduction.complete(p)
        self.waiting.clear()
        self.n_waiting = 0

    def end_micro_batch(self, **options: Any) -> None:
        """Adds up what still waits: it may be in memory where a CUDA graph writes the next micro-batch's gradients."""
        self.add_up()
        self.end_backward(**options)

    def hand_over(self, pipeline_parallel: bool = False) -> None:
        """The last micro-batch of a step is done: the sums become what the optimizer calls averaged gradients."""
        from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

        self.add_up()
        for p, view in self.views.items():
            if p not in self.summed:
                view.zero_()
        if self.reduction is not None:
            self.reduction.finish()
        for i, (owned, partition) in enumerate(zip(self.owned, self.partitions, strict=True)):
            self.optimizer.averaged_gradients[i] = GradPartitionBufferGroup(owned, partition)
        self.summed.clear()
        self.optimizer._epilogue_ran_this_backward = True

    def leave_factor(self, gradients: list[Tensor], total_norm: Tensor) -> None:
        """Passes to AdamW what to divide the gradients by: loss scale, and the norm where it is above the limit."""
        zero = self.optimizer
        factor = torch.full((), float(zero.loss_scale), dtype=torch.float32, device=zero.device)
        if zero.clip_grad > 0:
            factor = factor * ((total_norm / zero.loss_scale + 1e-6) / zero.clip_grad).clamp(min=1.0)
        zero.optimizer.grad_scale = factor


class QueuedStep:
    """DeepSpeed's step, with the norm read once, after the launch of AdamW, instead of twice before it.

    DeepSpeed skips an update whose norm is not finite, and to know it the host waited while the device ran out of work.
    Now the device decides: with `found_inf` = 1 torch's fused AdamW leaves weights and moments as they are and takes
    back its count of steps; the weights in bf16 are copied from their unchanged masters again. The host reads
    the norm while AdamW runs, and then gives DeepSpeed what its step would have found. So everything is known when
    `step` returns.

    Args:
        zero: DeepSpeed's optimizer of bf16 weights, whose torch.optim.AdamW is fused and gets its factor by
            `FlatGradients.leave_factor`; two of its methods are replaced.
    """

    def __init__(self, zero: Any):
        self.zero = zero
        zero.check_grad_overflow = False  # without it a step in bf16 looks at no number on its way
        self.launch, zero.step = zero.step, self.step
        self.norm, zero.scaled_global_norm = zero.scaled_global_norm, self.scaled_global_norm

    def step(self, closure: Any = None) -> None:
        """Launches norm, AdamW, copies and all-gather; returns once the norm is known, the rest may still run."""
        self.launch()
        norm = float(self.on_its_way.read())
        self.zero.overflow = not math.isfinite(norm)
        self.zero._global_grad_norm = norm

    def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
        """The norm, infinite where it is not finite; AdamW gets that as `found_inf`; its copy to the host is queued."""
        norm = self.norm(norm_type)
        self.zero.optimizer.found_inf = (~norm.isfinite()).float()
        self.on_its_way = Readback(norm)
        return norm


def gradient_in_partition(view: Tensor, partition: Tensor) -> Tensor:
    """The part of a gradient in a partition of the same flat tensor: the whole one in its shape, a part flat."""
    first = max(view.storage_offset(), partition.storage_offset()) - partition.storage_offset()
    last = min(view.storage_offset() - partition.storage_offset() + view.numel(), partition.numel())
    return view if last - first == view.numel() else partition[first:last]


def grad_norm(optimizer: Any, gradients: list[Tensor], params: list[nn.Parameter]) -> Tensor:
    """Euclidean norm of a parameter group's gradients over all ranks, 0-dim float32; -1 where it is not finite.

    Args:
        gradients: this rank's partition, one tensor for each of params, with padding of the partition in between.
        params: those split over tensor ranks count on every rank, the others on the first one only.
    """
    from deepspeed.runtime.utils import is_model_parallel_parameter

    unpadded = [g for g in gradients if not getattr(g, "_zero_padding", False)]
    counted = [
        g.detach()
        for g, p in zip(unpadded, params, strict=False)
        if (is_model_parallel_parameter(p) or optimizer.model_parallel_rank == 0)
        and not getattr(p, "ds_pipe_replicated", False)
    ]
    square = torch.zeros((), dtype=torch.float32, device=optimizer.device)
    if counted:
        square = torch.stack(torch._foreach_norm(counted, 2, dtype=torch.float32)).square().sum()
    dist.all_reduce(square, group=optimizer.dp_process_group)
    optimizer._model_parallel_all_reduce(tensor=square, op=dist.ReduceOp.SUM)
    norm = square.sqrt()
    return torch.where(norm.isfinite(), norm, -1.0)
