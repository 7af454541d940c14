"""What training and checkpoints ask of an engine: the few of DeepSpeed's methods that they call."""

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from megatron_taipan.layer_kinds.metrics import LayerMetrics


@runtime_checkable
class Engine(Protocol):
    """A network with its optimizer, spread over ranks, as `build_engine` makes it.

    The network is called through the engine; each micro-batch is a forward pass, `backward` and `step`, and the step of
    a global batch's last one updates.
    """

    device: torch.device
    optimizer: Any  # ZeRO's, around torch's, another class at each stage; only this room looks inside
    basic_optimizer: torch.optim.Optimizer  # torch's; for this room as well

    @property
    def module(self) -> nn.Module:
        """The network, or this process's pipeline stage of it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The network's forward pass; not in a pipeline."""

    def backward(self, loss: Tensor, /) -> Any:
        """Gradients of the loss of one micro-batch."""

    def step(self) -> Any:
        """The end of a micro-batch: the update after the last one."""

    def train(self) -> Any:
        """Training mode."""

    def eval(self) -> Any:
        """Evaluation mode."""

    def zero_optimization_stage(self) -> int:
        """0 to 3."""

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether this micro-batch is the last of its global batch."""

    def get_global_grad_norm(self) -> Any:
        """Norm of the last update's gradients before clipping; None at stage 0."""


def layer_metrics(engine: Engine) -> LayerMetrics:
    """What the layers of the engine's network measure; every stage of a pipeline knows all of them."""
    network: Any = engine.module  # Taipan or TaipanPipeline
    return network.layer_metrics


def norm_and_skipped(engine: Engine) -> tuple[float, bool]:
    """Of the last step at stages 1 to 3: the gradients' norm over all ranks, and whether nothing was updated."""
    return float(engine.get_global_grad_norm()), bool(engine.optimizer.overflow)
