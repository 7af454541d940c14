"""Counts what a GPU would be given: torch operations that compute, and launches of our kernels in the interpreter."""

from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from triton.runtime import interpreter

# They compute nothing. What is inside of a custom operation is not seen: ours only allocate, view and launch.
FREE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view")


class _Computes(TorchDispatchMode):
    def __init__(self, seen: Counter[str]):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        package, name = func._schema.name.split("::")
        returns = func._schema.returns
        is_view = returns and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if package == "aten" and name not in FREE and not is_view:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def launches(run: Callable[[], Any]) -> Counter[str]:
    """By name, in one call of `run` on CPU tensors with interpreted kernels."""
    seen, launch = Counter[str](), interpreter.GridExecutor.__call__

    def counted(executor: Any, *args: Any, **kwargs: Any) -> None:
        seen[executor.fn.__name__] += 1
        with _disable_current_modes():  # the interpreter computes with torch
            launch(executor, *args, **kwargs)

    with mock.patch.object(interpreter.GridExecutor, "__call__", counted), _Computes(seen):
        run()
    return seen
