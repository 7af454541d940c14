"""What layers hand on: the residual stream between two of them, and what one measured."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_taipan.ops.norms import keeps_summands


class Stream(NamedTuple):
    """The residual stream, whose last addition may be pending: its value is h + branch.

    A layer hands on what its last part computed and leaves the addition to the norm of the next layer, whose kernel
    reads the sum anyway (`StreamNorm`). `total` adds where no layer follows that runs together with this one:
    at the end of the network, of a CUDA graph, of a pipeline stage, of what is recomputed as one. A tuple for ZeRO-3's
    sake.
    """

    h: Tensor  # [b, l, d] or this rank's shard of its tokens, [b l / tp, d]
    branch: Tensor | None = None  # shaped as h, in the type that layers compute in
    kept: bool = False  # whether the norm before keeps h for its backward pass

    def total(self, into: Tensor | None = None) -> Tensor:
        """The stream's value, in h's type; written `into` a tensor of its shape and type where one is given."""
        if into is not None:
            value: Tensor = _Into.apply(self.h, self.branch, into)
            return value
        return self.h if self.branch is None else self.h + self.branch  # h's type is the wider one

    def normed(self, h: Tensor, branch: Tensor) -> "Stream":
        """The stream after a layer whose norm took this one, gave its value h, and led to the layer's output."""
        return Stream(h, branch, not keeps_summands(self.h, self.branch, self.kept))


class _Into(torch.autograd.Function):
    """h + branch in the memory of a given tensor, which autograd does not take for a change of that tensor."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, branch: Tensor | None, into: Tensor) -> Tensor:
        ctx.branch_dtype = None if branch is None else branch.dtype
        if branch is None:
            into.copy_(h)
        else:
            torch.add(h, branch, out=into)
        return into.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:  # type: ignore[override]
        return grad, None if ctx.branch_dtype is None else grad.to(ctx.branch_dtype), None


class Measured(NamedTuple):
    """What a layer gives besides the stream. A tuple for ZeRO-3's sake.

    A metric is a mean over this rank's part of a micro-batch. What is logged is its mean over micro-batches, data and
    tensor ranks: ranks that see other tokens or heads, as many each, need no reduction before that.
    """

    metrics: Tensor  # [n] float32, in the order of the kind's `metrics`
    budget_loss: Tensor | None = None  # scalar, which the network adds to its loss with weight gate.budget_lambda

    @staticmethod
    def check(measured: "Measured | None", layer: str, metrics: tuple[str, ...]) -> None:
        """Raises ValueError where a layer did not give what its kind's `metrics` names: those of others would move."""
        given = [] if measured is None else list(measured.metrics.shape)
        if given != ([len(metrics)] if metrics else []):
            raise ValueError(
                f"{layer} gave metrics of shape {given}, and its kind declares {len(metrics)}"
                f" ({', '.join(metrics)}): a block gives Measured with what LayerKind.metrics names, in every pass"
            )

    @staticmethod
    def join(parts: "list[Measured]") -> "Measured | None":
        """Of consecutive layers: their metrics as a new tensor, the sum of their losses; None without any."""
        if not parts:
            return None
        losses = [part.budget_loss for part in parts if part.budget_loss is not None]
        metrics = torch.cat([part.metrics.detach() for part in parts])  # recorded graphs give all with a gradient
        return Measured(metrics, sum(losses[1:], losses[0]) if losses else None)
