"""What the model is compared with: other people's code in float64, and definitions written out with dense masks."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor


class _WideTorch:
    """torch, in which float32 means float64."""

    float = float32 = torch.float64

    def __getattr__(self, name: str):
        return getattr(torch, name)


@contextmanager
def in_float64(monkeypatch, *modules: ModuleType) -> Iterator[None]:
    """Within it, code of `modules` that casts to float32 casts to float64: differences of 1e-12 become visible."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        for module in modules:
            patch.setattr(module, "torch", _WideTorch())
        yield


def visible(seq_idx: Tensor, window: int | None) -> Tensor:
    """[b, l, l] bool: token i sees token j where j <= i, both of one document, and i - j < window."""
    at = torch.arange(seq_idx.shape[1])
    distance = at[:, None] - at
    near = (distance >= 0) & (distance < (window or len(at)))
    return near & (seq_idx[:, :, None] == seq_idx[:, None])


def rms_norm(h: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(h, weight.shape, weight, eps)


def attention(u: Tensor, layer, mask: Tensor, heads: int, kv_heads: int, turn=lambda x: x) -> Tensor:
    """[b, l, d] -> [b, l, d]: every query, torch's SDPA with an explicit mask [b, l, l]."""
    b, l, _ = u.shape

    def split(weight: Tensor, n: int) -> Tensor:
        return F.linear(u, weight).view(b, l, n, -1).transpose(1, 2)  # [b, n, l, head_dim]

    q, k = turn(split(layer.q_proj, heads)), turn(split(layer.k_proj, kv_heads))
    k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, split(layer.v_proj, kv_heads)))
    o = F.scaled_dot_product_attention(q, k, v, mask[:, None])
    return F.linear(o.transpose(1, 2).reshape(b, l, -1), layer.out_proj)


def swiglu(u: Tensor, layer) -> Tensor:
    return (F.silu(u @ layer.gate_proj.T) * (u @ layer.up_proj.T)) @ layer.down_proj.T
