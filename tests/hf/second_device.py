"""A second device on a machine that has none: tensors that say they lie there, and compute on the CPU.

An operation of a tensor there and one on the CPU fails, as between two GPUs; only copies and single numbers cross.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy:1")  # a device type that torch knows, no build computes on, and nothing initialises
CROSSING = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class There(Tensor):
    """A tensor on DEVICE; `here` holds its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor, requires_grad: bool = False) -> "There":
        here = here.here if isinstance(here, There) else here
        there = torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            device=DEVICE, requires_grad=requires_grad,
        )  # fmt: skip
        there.here = here.detach()
        return there

    def tolist(self) -> Any:  # this and the next torch refuses where tensors hold no memory of their own
        return self.here.tolist()

    def untyped_storage(self) -> Any:
        return self.here.untyped_storage()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


class SecondDevice(TorchDispatchMode):
    """While it is entered, tensors can be made on DEVICE and copied to it."""

    def __enter__(self) -> "SecondDevice":
        setattr(torch, DEVICE.type, torch.cpu)  # torch's checkpoint() asks for a module of the device type's name
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        delattr(torch, DEVICE.type)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(function, args, kwargs or {})


def run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The operation on the CPU; its results lie where its tensors did, or where `device` says."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    places = {t.device for t in tensors if t.dim()} or {t.device for t in tensors}
    if len(places) > 1 and function not in CROSSING:
        raise RuntimeError(f"{function}: tensors on {sorted(map(str, places))}")
    device = kwargs.get("device")
    if function is torch.ops.aten.copy_.default:
        places = {args[0].device}
    if device is not None:
        places = {torch.device(device)}
        kwargs = kwargs | ({"device": "cpu"} if places == {DEVICE} else {})
    below_args, below = tree_map(lambda t: t.here if isinstance(t, There) else t, (args, kwargs))
    result = function(*below_args, **below)
    if places != {DEVICE}:
        return result
    result = tree_map(lambda t: There(t) if isinstance(t, Tensor) else t, result)
    return return_and_correct_aliasing(function, args, kwargs, result)
