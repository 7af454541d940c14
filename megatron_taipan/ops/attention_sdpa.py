"""Causal attention of every query by torch's scaled_dot_product_attention: cuDNN's kernel where it can, else torch's.

Rows are one document each: packed ones would need a mask of [l, l], with which none of the fast kernels runs.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

ORDER = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def load_sdpa() -> tuple[Callable, str]:
    """`causal_attention` (see `Ops`) for rows of one document and without a window, and torch's version."""

    def causal_attention(q: Tensor, k: Tensor, v: Tensor, document_start: Tensor, window: int | None) -> Tensor:
        if window is not None:
            raise ValueError(f"sdpa has no sliding window, and the layer asks for {window} tokens")
        b, l = document_start.shape
        grouped = q.shape[1] != k.shape[1]
        q, k, v = (t.unflatten(0, (b, l)).transpose(1, 2) for t in (q, k, v))  # [b, h, l, d]
        with sdpa_kernel(ORDER, set_priority=True):
            o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        return o.transpose(1, 2).flatten(0, 1)

    return causal_attention, torch.__version__
