"""The product of activations with a weight matrix, which may be in a module.

The trainer's layers own bare parameters: fused, split over ranks, recorded in CUDA graphs. A model loaded through
transformers has the same matrices in `nn.Linear` modules, because adapters (LoRA), quantised weights and offloading
replace such a module or wrap its call.
"""

import torch.nn.functional as F
from torch import Tensor, nn

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
