"""The short convolution by the package causal_conv1d (`causal_conv1d_fn`), in CUDA.

Its layout for packed documents is channels last: [b, c, l] whose channels are side by side, which is a transposed view
of ours. Rows and batches must begin at multiples of 8 elements; other inputs are copied.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_taipan.ops.causal_conv1d import causal_conv1d_reference
from megatron_taipan.ops.libraries import load_library

ALIGNED = 8  # elements


def load_causal_conv1d_cuda() -> tuple[Callable, str]:
    """`causal_conv1d` with the arguments of `causal_conv1d_reference`, and the package's version.

    A row's documents together with inputs before it, which only decoding has, go to the reference.

    Raises:
        UserError: the package cannot be used here.
    """
    module, version = load_library("causal_conv1d", "causal_conv1d", "conv")
    convolve = module.causal_conv1d_fn

    def causal_conv1d(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, *, seq_idx: Tensor | None = None,
        initial_tail: Tensor | None = None, return_tail: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        if seq_idx is not None and (initial_tail is not None or return_tail):
            return causal_conv1d_reference(
                x, weight, bias, seq_idx=seq_idx, initial_tail=initial_tail, return_tail=return_tail
            )
        x = _aligned(x)
        tail = initial_tail.to(x.dtype).contiguous() if initial_tail is not None else None
        y = convolve(
            x.transpose(1, 2), weight.contiguous(), bias=bias,
            seq_idx=seq_idx.int().contiguous() if seq_idx is not None else None,
            initial_states=tail.transpose(1, 2) if tail is not None else None, activation="silu",
        ).transpose(1, 2)  # fmt: skip
        if not return_tail:
            return y
        b, _, c = x.shape
        before = x.new_zeros(b, weight.shape[1] - 1, c) if tail is None else tail
        return y, torch.cat([before, x], 1)[:, x.shape[1] :]

    return causal_conv1d, version


def _aligned(x: Tensor) -> Tensor:
    """x [b, l, c] where the kernel can read it, else a copy."""
    places = x.stride(0), x.stride(1), x.storage_offset()
    aligned = x.stride(2) == 1 and not any(place % ALIGNED for place in places)
    return x if aligned else x.clone(memory_format=torch.contiguous_format)  # unaligned ones may be contiguous
