"""RMSNorm, and Mamba-2's gated RMSNorm by groups. Statistics are float32 (float64 where the input is)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_taipan.ops.numerics import at_least_float32


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension; the result has weight's dtype (arXiv 1910.07467).

    x may be a float32 residual stream while the weight, and so the layer's compute precision, is bf16.
    """
    xf = at_least_float32(x)
    scale = torch.rsqrt(xf.square().mean(-1, keepdim=True) + eps)
    return (xf * scale * weight).to(weight.dtype)


def add_rms_norm_reference(
    h: Tensor, branch: Tensor | None, weight: Tensor, eps: float, kept: bool = False
) -> tuple[Tensor, Tensor]:
    """The residual stream's sum and its norm in one: a layer's input, and the stream that goes around the layer.

    Args:
        h: [..., d] the stream; branch: [..., d] the output of the layer before, in h's type or a narrower one, or None.
        kept: whether h is kept for the backward pass anyway, by the norm before, see `keeps_summands`.

    Returns:
        u: [..., d] rms_norm(h + branch) in weight's dtype; h + branch: [..., d] in h's dtype.
    """
    total = h if branch is None else (h + branch).to(h.dtype)
    return rms_norm_reference(total, weight, eps), total


def keeps_summands(h: Tensor, branch: Tensor | None, kept: bool) -> bool:
    """Whether a fast `add_rms_norm` keeps h and branch for its backward pass, which adds them once more, and not their
    sum: where h is kept anyway and the branch is narrower. So of two norms one keeps half as much."""
    return branch is not None and kept and branch.element_size() < h.element_size()


def gated_rms_norm_reference(
    y: Tensor,
    z: Tensor,
    weight: Tensor,
    *,
    eps: float,
    group_size: int,
    reduce_sum: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """RMSNorm of y * silu(z), separately over each group of group_size channels (norm after the gate).

    Args:
        y, z: [..., d]; weight: [d].
        group_size: channels that share one root mean square, counted over all ranks. Where a group is spread over
            several ranks, `reduce_sum` adds the ranks' sums of squares; it must be differentiable.

    Returns:
        [..., d] in weight's dtype.
    """
    d = y.shape[-1]
    local = min(group_size, d)  # channels of a group on this rank
    gated = at_least_float32(y) * F.silu(at_least_float32(z))
    groups = gated.unflatten(-1, (d // local, local))
    squares = groups.square().sum(-1, keepdim=True)
    if reduce_sum is not None:
        squares = reduce_sum(squares)
    normed = (groups * torch.rsqrt(squares / group_size + eps)).flatten(-2)
    return (normed * weight).to(weight.dtype)
