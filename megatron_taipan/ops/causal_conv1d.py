"""The short causal depthwise convolution in front of the scan, with SiLU."""

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    seq_idx: Tensor | None = None,
    initial_tail: Tensor | None = None,
    return_tail: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """y_t = silu(bias + sum_k weight[:, k] x_{t-w+1+k}), over tokens of t's own document only.

    Args:
        x: [b, l, c]; weight: [c, w]; bias: [c].
        seq_idx: [b, l] document of each token, non-decreasing; None: one document.
        initial_tail: [b, w-1, c], the inputs before the first token, from the first token's document; None: zeros.
        return_tail: also return the last w-1 inputs [b, w-1, c], zeroed where they belong to another document than the
            last token, so that they can be the next call's initial_tail.
    """
    b, l, c = x.shape
    w = weight.shape[1]
    tail = x.new_zeros(b, w - 1, c) if initial_tail is None else initial_tail.to(x.dtype)
    padded = torch.cat([tail, x], 1)  # [b, w-1+l, c]
    weight = weight.to(x.dtype)
    if seq_idx is None:
        y = F.conv1d(padded.transpose(1, 2), weight[:, None], groups=c).transpose(1, 2)
    else:
        # One shifted product per tap, so that each tap can be switched off across a document boundary.
        documents = torch.cat([seq_idx[:, :1].expand(b, w - 1), seq_idx], 1)
        y = torch.zeros_like(x)
        for k in range(w):
            same = (documents[:, k : k + l] == seq_idx)[..., None]
            y = y + torch.where(same, padded[:, k : k + l], 0) * weight[:, k]
    if bias is not None:
        y = y + bias.to(x.dtype)
    y = F.silu(y)
    if not return_tail:
        return y
    tail = padded[:, l:]
    if seq_idx is not None:
        documents = torch.cat([seq_idx[:, :1].expand(b, w - 1), seq_idx], 1)[:, l:]
        tail = torch.where((documents == seq_idx[:, -1:])[..., None], tail, 0)
    return y, tail
