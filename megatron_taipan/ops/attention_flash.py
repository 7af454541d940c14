"""Causal attention of every query, full or through a sliding window, by flash_attn."""

import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_taipan.errors import UserError
from megatron_taipan.ops.libraries import load_library


def load_flash_attention(*, packed: bool) -> tuple[Callable, str]:
    """`causal_attention` (see `Ops`) and flash_attn's version.

    Args:
        packed: rows hold several documents. Their number is then read by the host, once a micro-batch, so no CUDA graph
            can hold the operation; whole rows are one document each.

    Raises:
        UserError: flash_attn cannot be used here, or not on this GPU.
    """
    module, version = load_library("flash_attn", "flash_attn", "attention")
    if torch.cuda.get_device_capability() < (8, 0):
        raise UserError(
            f"ops.attention=flash_attn needs an NVIDIA GPU of compute capability 8.0 or later;"
            f" {torch.cuda.get_device_name()} has {'.'.join(map(str, torch.cuda.get_device_capability()))}. Use"
            " ops.attention=auto"
        )
    boundaries = Boundaries()

    def causal_attention(q: Tensor, k: Tensor, v: Tensor, document_start: Tensor, window: int | None) -> Tensor:
        b, l = document_start.shape
        options = {
            "causal": True, "window_size": (-1 if window is None else window - 1, 0 if window is not None else -1),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        }  # fmt: skip
        if not packed:
            o = module.flash_attn_func(*(t.unflatten(0, (b, l)) for t in (q, k, v)), **options)
            return o.flatten(0, 1)
        starts = boundaries(document_start)
        return module.flash_attn_varlen_func(q, k, v, starts, starts, l, l, **options)

    return causal_attention, version


class Boundaries:
    """cu_seqlens: where documents begin in the flattened tokens, and their end, [documents + 1] int32.

    The layers of a pass, and their recomputation, share one `document_start`: it is read once.
    """

    def __init__(self) -> None:
        self.read: weakref.ref[Tensor] | None = None
        self.found: Tensor | None = None

    def __call__(self, document_start: Tensor) -> Tensor:
        """Args: document_start: [b, l], the place in its row at which each token's document begins."""
        if self.found is None or self.read is None or self.read() is not document_start:
            place = torch.arange(document_start.shape[1], device=document_start.device)
            begins = (document_start == place).flatten().nonzero()[:, 0]
            self.found = F.pad(begins, (0, 1), value=document_start.numel()).int()
            self.read = weakref.ref(document_start)
        return self.found
