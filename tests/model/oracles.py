"""What the model is compared with: other people's code in float64, and definitions written out with dense masks."""

from collections.abc import Callable, Iterator
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


def rotary(seq_idx: Tensor, theta: float) -> Callable[[Tensor], Tensor]:
    """Turns [b, heads, l, d]: each pair (i, i + d/2), as a complex number, by its position in the document."""
    within = torch.stack(
        [torch.cat([torch.arange(int(n)) for n in row.unique_consecutive(return_counts=True)[1]]) for row in seq_idx]
    )

    def turn(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        frequency = theta ** (-torch.arange(half, dtype=torch.float64) * 2 / x.shape[-1])
        angle = within[:, None, :, None] * frequency
        turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([turned.real, turned.imag], -1)

    return turn


def swiglu(u: Tensor, layer) -> Tensor:
    return (F.silu(u @ layer.gate_proj.T) * (u @ layer.up_proj.T)) @ layer.down_proj.T


def mamba2(layer, h: Tensor, seq_idx: Tensor, *, headdim: int, groups: int) -> Tensor:
    """The block `M`, [b, l, d] -> [b, l, d]: token by token, the state and the convolution's inputs of the token's own
    document only."""
    mixer, (b, l, _) = layer.mixer, h.shape
    u = rms_norm(h, layer.norm.weight, mixer.eps)
    z, x, B, C, dt = (F.linear(u, getattr(mixer, f"in_proj_{name}")) for name in ("z", "x", "B", "C", "dt"))
    inputs = torch.cat([x, B, C], -1)
    taps = torch.cat([mixer.conv_x_weight, mixer.conv_B_weight, mixer.conv_C_weight])  # [channels, d_conv]
    bias = torch.cat([mixer.conv_x_bias, mixer.conv_B_bias, mixer.conv_C_bias])
    dt, A = F.softplus(dt + mixer.dt_bias), -mixer.A_log.exp()
    heads = len(A)
    state, outputs = h.new_zeros(b, heads, headdim, B.shape[-1] // groups), []
    for t in range(l):
        here = bias.expand(b, -1)
        for back in range(min(t + 1, taps.shape[1])):
            same = (seq_idx[:, t - back] == seq_idx[:, t])[:, None]
            here = here + same * inputs[:, t - back] * taps[:, -1 - back]
        x_t, B_t, C_t = F.silu(here).split([x.shape[-1], B.shape[-1], C.shape[-1]], -1)
        x_t = x_t.view(b, heads, headdim)
        B_t, C_t = (s.view(b, groups, -1).repeat_interleave(heads // groups, 1) for s in (B_t, C_t))  # [b, heads, n]
        goes_on = (seq_idx[:, t] == seq_idx[:, max(t - 1, 0)])[:, None, None, None]
        decay = (dt[:, t] * A).exp()[..., None, None]
        state = goes_on * decay * state + (dt[:, t, :, None] * x_t)[..., None] * B_t[:, :, None]
        outputs.append((state @ C_t[..., None])[..., 0] + mixer.D[:, None] * x_t)
    y = torch.stack(outputs, 1).flatten(2) * F.silu(z)  # [b, l, inner]
    normed = [F.rms_norm(part, part.shape[-1:], eps=mixer.eps) for part in y.chunk(groups, -1)]
    return h + F.linear(torch.cat(normed, -1) * mixer.norm_weight, mixer.out_proj)
