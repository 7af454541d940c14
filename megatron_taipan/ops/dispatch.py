"""Picks which implementation of an operation runs, and says why; nothing else does."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_taipan.errors import UserError
from megatron_taipan.ops.causal_conv1d import causal_conv1d_reference
from megatron_taipan.ops.cross_entropy import linear_cross_entropy_reference
from megatron_taipan.ops.decode import decode_attention_reference, ssd_update_reference
from megatron_taipan.ops.fast import KERNELS, load_mamba2_mix
from megatron_taipan.ops.interval_attention import interval_attention_reference
from megatron_taipan.ops.norms import add_rms_norm_reference, gated_rms_norm_reference, rms_norm_reference
from megatron_taipan.ops.refine import refine_reference
from megatron_taipan.ops.selected_rows import (
    bounded_linear_reference,
    gather_linear_reference,
    scatter_rows_reference,
    select_rows_reference,
)
from megatron_taipan.ops.ssd import ssd_reference
from megatron_taipan.ops.swiglu import silu_mul_reference

REFERENCES: dict[str, Callable] = {
    "ssd": ssd_reference,
    "causal_conv1d": causal_conv1d_reference,
    "rms_norm": rms_norm_reference,
    "add_rms_norm": add_rms_norm_reference,
    "gated_rms_norm": gated_rms_norm_reference,
    "interval_attention": interval_attention_reference,
    "linear_cross_entropy": linear_cross_entropy_reference,
    "silu_mul": silu_mul_reference,
    "select_rows": select_rows_reference,
    "gather_linear": gather_linear_reference,
    "bounded_linear": bounded_linear_reference,
    "scatter_rows": scatter_rows_reference,
    "refine": refine_reference,
    "decode_attention": decode_attention_reference,
    "ssd_update": ssd_update_reference,
}


@dataclass(frozen=True)
class Ops:
    """The operations that the layers call. Tensors on a CPU always take the reference."""

    ssd: Callable
    causal_conv1d: Callable
    rms_norm: Callable
    add_rms_norm: Callable
    gated_rms_norm: Callable
    interval_attention: Callable
    linear_cross_entropy: Callable
    silu_mul: Callable
    select_rows: Callable
    gather_linear: Callable
    bounded_linear: Callable
    scatter_rows: Callable
    refine: Callable
    decode_attention: Callable
    ssd_update: Callable
    mamba2_mix: Callable | None
    """conv, scan, gate and norm as one operation on CUDA tensors, or None: the layer calls them one by one."""
    kernels: frozenset[str]
    """Names of the operations for which CUDA tensors take a fast kernel."""
    report: str
    """One line for the log: which implementation runs, and why."""


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


def takes_kernels(x: torch.Tensor) -> bool:
    """Whether kernels exist for tensors of this device and dtype."""
    return x.is_cuda and x.dtype != torch.float64


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
