"""Parameters concatenated along their rows, without a copy where they are adjacent in memory; or some rows of one.

DeepSpeed's ZeRO stages 1 and 2 keep all parameters of a group in one flat buffer, in the order in which the model
registers them. So the parts of a projection that are registered in sequence form one matrix there already.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_taipan.ops.product import Weight, product


class _JoinRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *parts: Tensor) -> Tensor:
        ctx.rows = [len(part) for part in parts]
        if not adjoin(parts):
            return torch.cat(parts)
        first = parts[0].detach()
        return first.as_strided((sum(ctx.rows), *first.shape[1:]), first.stride(), first.storage_offset())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        return grad.split(ctx.rows)


def adjoin(parts: tuple[Tensor, ...]) -> bool:
    """Whether contiguous parts of one type are in one storage, each directly after the one before it."""
    first = parts[0]
    end = first.storage_offset()
    for part in parts:
        if (
            part.storage_offset() != end
            or not part.is_contiguous()
            or part.dtype != first.dtype
            or part.shape[1:] != first.shape[1:]
            or part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
        ):
            return False
        end += part.numel()
    return True


def join_rows(*parts: Tensor) -> Tensor:
    """torch.cat(parts) for reading; a view of the parts where they adjoin. Gradients reach each part as its rows."""
    if torch.compiler.is_compiling() or any(part.device.type == "meta" for part in parts):
        return torch.cat(parts)
    joined: Tensor = _JoinRows.apply(*parts)
    return joined


def products(u: Tensor, *weights: Weight) -> Tensor:
    """The products of u with every weight side by side, for few tokens: one product where the weights adjoin; elsewhere
    to join them would cost more than a product each, since they are read only once."""
    matrices = tuple(weight for weight in weights if isinstance(weight, Tensor))
    if len(matrices) == len(weights) and not torch.compiler.is_compiling() and adjoin(matrices):
        return product(u, join_rows(*matrices))
    return torch.cat([product(u, weight) for weight in weights], -1)


def take_rows(t: Tensor, first: int, n: int) -> Tensor:
    """t[first : first + n]; t itself where these are all: a slice's gradient is put into zeros, at two launches."""
    return t if n == len(t) else t[first : first + n]
