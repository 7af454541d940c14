"""The operations that layers call, and for each the plain torch reference, its specification.

Which kernels take their place where is said in dispatch.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_taipan.ops.causal_conv1d import causal_conv1d_reference
from megatron_taipan.ops.cross_entropy import linear_cross_entropy_reference
from megatron_taipan.ops.decode import conv_update_reference, decode_attention_reference, ssd_update_reference
from megatron_taipan.ops.interval_attention import interval_attention_reference
from megatron_taipan.ops.norms import add_rms_norm_reference, gated_rms_norm_reference, rms_norm_reference
from megatron_taipan.ops.refine import refine_reference
from megatron_taipan.ops.rope import rotate_reference
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
    "rotate": rotate_reference,
    "silu_mul": silu_mul_reference,
    "select_rows": select_rows_reference,
    "gather_linear": gather_linear_reference,
    "bounded_linear": bounded_linear_reference,
    "scatter_rows": scatter_rows_reference,
    "refine": refine_reference,
    "decode_attention": decode_attention_reference,
    "conv_update": conv_update_reference,
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
    rotate: Callable
    silu_mul: Callable
    select_rows: Callable
    gather_linear: Callable
    bounded_linear: Callable
    scatter_rows: Callable
    refine: Callable
    decode_attention: Callable
    conv_update: Callable
    ssd_update: Callable
    mamba2_mix: Callable | None
    """conv, scan, gate and norm as one operation on CUDA tensors, or None: the layer calls them one by one."""
    add_norm_linear: Callable | None
    """A norm of the stream and the product that reads it as one operation on CUDA tensors, or None: one by one."""
    add_norm_swiglu: Callable | None
    """A norm of the stream and the SwiGLU that reads it as one operation on CUDA tensors, or None: one by one."""
    kernels: frozenset[str]
    """Names of the operations that CUDA tensors take a fast kernel for."""
    report: str
    """One line for the log: which implementation runs, and why."""
    causal_attention: Callable | None = None
    """Attention from every token on the device of training, or None: the layer calls interval_attention. Arguments:
    q [b * l, hq, d]; k, v [b * l, hk, d]; document_start [b, l], the place in its row at which each token's document
    begins; window, the tokens that a query sees at most, or None. Returns [b * l, hq, d]."""
    every_query: Callable | None = None
    """Attention of every token, of which picked ones learn, as one operation on CUDA tensors, or None: the layer calls
    interval_attention for the picked ones, and once more for all without gradients."""
    gate_scores: Callable | None = None
    """Logits and noise of a gate in one kernel on CUDA tensors, or None: the gate computes them one by one."""
    unrecordable: str = ""
    """Why no CUDA graph can hold these operations, or nothing."""


def reference_ops() -> Ops:
    """The references alone, for a machine or a folder without kernels."""
    return Ops(
        **REFERENCES,
        mamba2_mix=None,
        add_norm_linear=None,
        add_norm_swiglu=None,
        kernels=frozenset(),
        report="ops: all reference (no kernels here)",
        unrecordable="",
    )


def takes_kernels(x: torch.Tensor) -> bool:
    """Whether kernels exist for tensors of this device and dtype."""
    return x.is_cuda and x.dtype != torch.float64
