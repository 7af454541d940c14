"""What our speed is compared with: a Transformer++ and a Taipan composed of existing parts. Benchmarks only.

Plain modules in bf16 with the sizes of a ModelConfig, called as `model(tokens, labels) -> loss`.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_taipan.errors import UserError
from megatron_taipan.layer_kinds.mamba2 import MAMBA2
from megatron_taipan.layer_kinds.registry import kind_of
from megatron_taipan.model_config import ModelConfig


class Norm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-5)


class FeedForward(nn.Module):
    def __init__(self, d: int, inner: int):
        super().__init__()
        self.norm, self.up, self.down = Norm(d), nn.Linear(d, 2 * inner, bias=False), nn.Linear(inner, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.up(self.norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class FullAttention(nn.Module):
    """Causal attention with RoPE through torch's SDPA."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads, self.norm = heads, Norm(d)
        self.qkv, self.out = nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [b, l, d]; cos and sin: [l, d / heads / 2], made once for all layers."""
        b, l, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, l, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(o.transpose(1, 2).reshape(b, l, d))


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of [b, h, l, d] with tables [l, d / 2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def rope_tables(length: int, width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [length, width / 2] in like's type and on its device."""
    speed = 500_000.0 ** -(torch.arange(width // 2, device=like.device) / (width // 2))
    angle = torch.arange(length, device=like.device)[:, None] * speed
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


class WindowAttention(FullAttention):
    """Sliding window over every query through flex_attention: how a selective layer is made of existing parts."""

    def __init__(self, d: int, heads: int, mask: Any):
        super().__init__(d, heads)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.attention.flex_attention import flex_attention

        b, l, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, l, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        o = flex_attention(q, k, v, block_mask=self.mask)  # fused where the block is compiled
        return x + self.out(o.transpose(1, 2).reshape(b, l, d))


def window_mask(window: int, length: int) -> Any:
    """The block mask that all window layers share."""
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, q, k: (k <= q) & (q - k < window), None, None, length, length, device="cuda")


class MambaSsmBlock(nn.Module):
    """mamba_ssm's Mamba2 after a norm. It has its own kernels; the compiler only sees the norm and the addition."""

    def __init__(self, config: ModelConfig):
        from mamba_ssm.modules.mamba2 import Mamba2

        super().__init__()
        m = config.mamba
        self.norm = Norm(config.d_model)
        self.mixer = Mamba2(config.d_model, d_state=m.d_state, headdim=m.headdim, expand=m.expand, ngroups=m.n_groups)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(x))

    @torch.compiler.disable
    def mix(self, u: Tensor) -> Tensor:
        return self.mixer(u)


class Stack(nn.Module):
    """Embedding, blocks, norm, tied head and plain cross entropy."""

    def __init__(self, config: ModelConfig, blocks: list[nn.Module]):
        super().__init__()
        self.head_size = config.head_dim
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.init_std)
        self.blocks, self.norm = nn.ModuleList(blocks), Norm(config.d_model)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(tokens)
        tables = rope_tables(tokens.shape[1], self.head_size, x)
        for block in self.blocks:
            x = block(x, *tables) if type(block) is FullAttention else block(x)
        return self.head(x, self.norm.weight, self.embedding.weight, labels)

    @staticmethod
    def head(x: Tensor, norm: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(F.rms_norm(x, (x.shape[-1],), norm, 1e-5), weight)
        return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten())

    def compile_regions(self) -> None:
        """Compiles each kind of block once, and the head: as fast as one graph, in a fraction of its time.

        One graph of 40 blocks takes minutes to compile, most of them for mamba_ssm's kernels, which gain nothing.
        """
        for block in self.blocks:
            block.compile(dynamic=False)
        self.head = torch.compile(self.head, dynamic=False)  # type: ignore[method-assign]


def make_transformer(config: ModelConfig, layers: int = 20) -> nn.Module:
    """Transformer++: the preset transformerpp of the same width."""
    blocks = []
    for _ in range(layers):
        blocks += [FullAttention(config.d_model, config.attention.n_heads), FeedForward(config.d_model, config.d_ff)]
    return Stack(config, blocks)


def make_composition(config: ModelConfig, length: int) -> nn.Module:
    """The pattern of `config` with mamba_ssm's Mamba2 for M and an all-query flex window for S."""
    blocks: list[nn.Module] = []
    mask = window_mask(config.attention.window, length)
    for letter in config.letters:
        kind = kind_of(letter)
        if kind is MAMBA2:
            blocks.append(MambaSsmBlock(config))
        elif not kind.attends:
            raise UserError(f"there is no peer for layers of {kind.name}; take them out of model.pattern")
        else:
            attention = WindowAttention(config.d_model, config.attention.n_heads, mask)
            blocks.append(nn.Sequential(attention, FeedForward(config.d_model, config.d_ff)))
    return Stack(config, blocks)
