"""What we replace in DeepSpeed's ZeRO optimizers of stages 1 and 2: the same results with few launches."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def quicken(optimizer: Any) -> None:
    """Replaces per-parameter loops of an optimizer of stage 1 or 2 in place; other optimizers stay as they are.

    - The search for infinities ran over every gradient of every parameter, and waited for the device; then came the
      norm, which shows the same: it is not finite where a gradient is not, and the step looks at it in any case.
    - The norm took three launches a parameter; now one kernel handles many.

    On a 1.3B model on an H100 the two cost more than 100 ms a step, most of it on the CPU.
    """
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or optimizer.cpu_offload or not optimizer.compute_grad_norm:
        return
    optimizer.check_overflow = lambda partition_gradients=True: None
    optimizer.get_grad_norm_direct = lambda gradients, params, norm_type=2: grad_norm(optimizer, gradients, params)


def grad_norm(optimizer: Any, gradients: list[Tensor], params: list[nn.Parameter]) -> Tensor:
    """Euclidean norm of a parameter group's gradients over all ranks, 0-dim float32; -1 where it is not finite.

    Args:
        gradients: this rank's partition, one tensor for each of params, with padding of the partition in between.
        params: those split over tensor ranks count on every rank, the others on the first one only.
    """
    from deepspeed.runtime.utils import is_model_parallel_parameter

    ours = [g for g in gradients if not getattr(g, "_zero_padding", False)]
    counted = [
        g.detach()
        for g, p in zip(ours, params, strict=False)
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
