"""Kernels that are not launched: on the meta device the fast operations make their tensors and compute none of them.

So what a layer keeps for its backward pass is known without a GPU, at any size.
"""

import sys
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch._dynamo  # noqa: F401 - it looks for Triton once, and must not find the stand-in

from megatron_taipan.model import attention, layers, mamba2
from megatron_taipan.ops import dispatch


@contextmanager
def unlaunched_ops(recompute_mixer: Collection[str] = ()) -> Iterator[dispatch.Ops]:
    """The fast operations, whatever the device of their tensors, while it is entered."""
    with ExitStack() as stack:
        for module in (attention, dispatch, layers, mamba2):
            stack.enter_context(mock.patch.object(module, "takes_kernels", lambda x: True))
        try:
            from triton.runtime import interpreter, jit
        except ImportError:
            stack.callback(forget_kernels)
            stack.enter_context(mock.patch.dict(sys.modules, stand_in()))
        else:
            for kind in (jit.JITFunction, interpreter.InterpretedFunction):
                stack.enter_context(mock.patch.object(kind, "run", lambda *arguments, **options: None))
        with mock.patch("torch.cuda.is_available", lambda: True):
            ops = dispatch.pick_ops("fast", recompute_mixer=recompute_mixer)
        yield ops


def forget_kernels() -> None:
    """Lets the next import of a kernel find again that there is no Triton."""
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron_taipan.ops.") and hasattr(module, "triton"):
            del sys.modules[name]


class Unlaunched:
    """kernel[grid](...) does nothing."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **options: None


def stand_in() -> dict[str, ModuleType]:
    """What the kernels' files import of Triton, by module."""
    names = ("triton", "triton.language", "triton.tools", "triton.tools.tensor_descriptor")
    made = {name: ModuleType(name) for name in names}
    triton, tl = made["triton"], made["triton.language"]
    triton.jit = lambda kernel=None, **options: Unlaunched() if kernel else lambda kernel: Unlaunched()
    triton.cdiv = lambda a, b: -(-a // b)
    triton.next_power_of_2 = lambda n: 1 << max(0, n - 1).bit_length()
    triton.language = tl
    for name in ("constexpr", "float32", "float16", "bfloat16"):
        setattr(tl, name, SimpleNamespace())
    made["triton.tools.tensor_descriptor"].TensorDescriptor = lambda *arguments: None
    return made
