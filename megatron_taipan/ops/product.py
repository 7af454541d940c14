"""The product of activations with a weight matrix, which may be in a module.

The trainer's layers own bare parameters: fused, split over ranks, recorded in CUDA graphs. A model loaded through
transformers has the same matrices in `nn.Linear` modules, because adapters (LoRA), quantised weights and offloading
replace such a module or wrap its call.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_taipan.ops.numerics import at_least_float32

Weight = Tensor | nn.Module  # [e, d]; a module, when called, returns the product with its matrix


def product(x: Tensor, weight: Weight) -> Tensor:
    """x @ weight^T: [..., d], [e, d] -> [..., e]."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    y: Tensor = weight(x)
    return y


def bare(weight: Weight) -> Weight:
    """The matrix of a module that only multiplies with it; any other module (an adapter, a hook, a quantised weight)
    unchanged, to be called."""
    if type(weight) is nn.Linear and type(weight.weight) is nn.Parameter and weight.bias is None:
        hooks = (*weight._forward_hooks, *weight._forward_pre_hooks)
        return weight if hooks or "forward" in vars(weight) else weight.weight  # some tools replace `forward` itself
    return weight


def wide_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """F.linear(at_least_float32(x), weight, bias), which keeps x for the backward pass and not its float32 copy.

    Args:
        x: [..., d]; weight: [e, d] and bias: [e] in x's type or float32, whichever is wider.
    """
    product: Tensor = _WideProduct.apply(x, weight, bias)
    return product


class _WideProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(at_least_float32(x), weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])  # [n, e]
        dx = (rows @ weight).view(x.shape).to(x.dtype) if needs_x else None
        dweight = rows.t() @ at_least_float32(x).reshape(-1, x.shape[-1]) if needs_weight else None
        return dx, dweight, rows.sum(0) if needs_bias else None
