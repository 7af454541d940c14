"""Picks which implementation of an operation runs, and says why; nothing else does."""

from collections.abc import Callable

import torch

from megatron_taipan.errors import UserError
from megatron_taipan.ops.fast import KERNELS, load_mamba2_mix
from megatron_taipan.ops.operations import REFERENCES, Ops, takes_kernels


def pick_ops(backend: str = "auto") -> Ops:
    """Chooses the implementations once, at start-up.

    Args:
        backend: "auto" takes each fast kernel that runs here; "reference" takes none; "fast" requires all of them.

    Raises:
        UserError: backend is "fast" and a kernel that this project has cannot run here.
    """
    chosen, words, lacking, kernels = {}, [], [], set()
    for name, reference in REFERENCES.items():
        fast, label = (None, "reference (asked for)") if backend == "reference" else _fast(name)
        chosen[name] = reference if fast is None else _on_gpu(fast, reference)
        words.append(f"{name}={label}")
        if fast is not None:
            kernels.add(name)
        if fast is None and name in FAST:
            lacking.append(f"{name}: {label}")
    if backend == "fast" and lacking:
        raise UserError(
            f"ops.backend=fast, but these kernels cannot run here: {'; '.join(lacking)}; use ops.backend=auto"
        )
    mix = _mamba2_mix() if backend != "reference" else None
    return Ops(**chosen, mamba2_mix=mix, kernels=frozenset(kernels), report="ops: " + " ".join(words))


def _fast(name: str) -> tuple[Callable | None, str]:
    """The fast implementation and its label, or None and the reason."""
    if name not in FAST:
        return None, "reference (no kernel)"
    if not torch.cuda.is_available():
        return None, "reference (no CUDA)"
    label, load = FAST[name]
    try:
        return load(), label
    except ImportError as error:
        return None, f"reference ({error})"


def _mamba2_mix() -> Callable | None:
    """The fused mixer where its parts run."""
    if not torch.cuda.is_available() or "ssd" not in FAST:
        return None
    try:
        return _on_its_gpu(load_mamba2_mix())
    except ImportError:
        return None


def _on_gpu(fast: Callable, reference: Callable) -> Callable:
    """The kernel for CUDA tensors in a dtype that kernels take, the reference for all others."""
    fast = _on_its_gpu(fast)

    def run(first: torch.Tensor, *args, **kwargs):
        return (fast if takes_kernels(first) else reference)(first, *args, **kwargs)

    return run


def _on_its_gpu(kernel: Callable) -> Callable:
    """A kernel that runs where its tensors are: Triton launches on the current device, wherever its arguments are."""

    def run(first: torch.Tensor, *args, **kwargs):
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():  # CPU: Triton's interpreter
            return kernel(first, *args, **kwargs)
        with torch.cuda.device(first.device):
            return kernel(first, *args, **kwargs)

    return run


# Kernels by operation: (label, function that imports and returns it; an ImportError means: not here).
FAST: dict[str, tuple[str, Callable[[], Callable]]] = KERNELS
