"""What is replaced in DeepSpeed's pipeline engine over ZeRO-1, so that it trains in 16 bits as it does in float32."""

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import BackwardPass, ReduceTiedGrads
from torch import Tensor


def patch_pipeline(engine: PipelineEngine) -> None:
    """Replaces methods of a pipeline engine in place.

    - Gradients of tied weights were looked for in `.grad`. Where gradients are summed over micro-batches in float32
      they are elsewhere, so nothing was added up and the stages' copies of the embedding drifted apart.
    - The norm of each parameter group was reduced over the stages separately. Stages may have different groups (one
      without a gate has no float32 matrix), and then hung, waiting for each other.
    - A stage went backward once from each tensor that it had sent on, the stream and then the budget losses. Both lead
      through all layers before a gate, so these ran backward twice; and what selective recomputation keeps can be
      used once.
    """
    patched = {ReduceTiedGrads: sum_tied_gradients, BackwardPass: backward_at_once}
    engine._INSTRUCTION_MAP = engine._INSTRUCTION_MAP | patched
    reduce_norm_once(engine.optimizer)


def sum_tied_gradients(engine: PipelineEngine) -> None:
    """Adds up the gradients of each tied weight over the stages that hold a copy."""
    for weight, group in engine.module.get_tied_weights_and_groups():
        gradient = engine.optimizer.get_gradient_for_reduction(weight)
        if gradient is None:
            raise RuntimeError(f"tied weight {getattr(weight, 'full_name', '')} got no gradient on this stage")
        dist.all_reduce(gradient, group=group)


def backward_at_once(engine: PipelineEngine, buffer_id: int) -> None:
    """The backward pass of one micro-batch through this stage, from all that it sent on."""
    if engine.is_last_stage():
        return engine._exec_backward_pass(buffer_id)
    buffers = engine.pipe_buffers
    sent = [t for t in buffers["outputs"][buffer_id] if t.is_floating_point()]
    engine._running_engine_backward = True  # else its hooks take it for a pass that the engine did not start
    try:
        torch.autograd.backward(sent, list(engine.grad_layer))
    finally:
        engine._running_engine_backward = False
    buffers["output_tensors"][buffer_id] = buffers["outputs"][buffer_id] = None


def reduce_norm_once(optimizer: Any) -> None:
    """Makes the optimizer join the norms of its groups first, and then reduce one number over the stages."""
    of_this_stage, over_stages = optimizer.scaled_global_norm, optimizer._model_parallel_all_reduce

    def scaled_global_norm(norm_type: int = 2) -> Tensor:
        """Euclidean norm of all ranks' gradients, times the loss scale; infinite where one of them is not finite."""
        optimizer._model_parallel_all_reduce = lambda tensor, op: None
        try:
            square = of_this_stage(norm_type).square()
        finally:
            del optimizer._model_parallel_all_reduce
        over_stages(tensor=square, op=dist.ReduceOp.SUM)
        return square.sqrt()

    optimizer.scaled_global_norm = scaled_global_norm
