"""`python -m benchmarks attention`: the selective window attention against FlashAttention-2 and flex_attention."""

import argparse
from collections.abc import Callable

import torch

from benchmarks.common import Table, add_out, median_ms


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    parser.add_argument("--length", type=int, default=32768, help="tokens")
    parser.add_argument("--densities", type=float, nargs="*", default=[0.02, 0.0625, 0.15, 0.25, 0.5])
    parser.add_argument("--skip-flex", action="store_true", help="do not compile flex_attention")
    add_out(parser)


def run(options: argparse.Namespace) -> None:
    from megatron_taipan.ops.interval_attention_triton import interval_attention

    table = Table("attention", options.out)
    total, heads, d, window = options.length, 16, 128, 2048

    def tensor(n: int) -> torch.Tensor:
        return torch.randn(n, heads, d, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    k, v = tensor(total), tensor(total)

    def times(attend: Callable, n: int) -> dict:
        q = tensor(n)
        grad = torch.randn(n, heads, d, device="cuda", dtype=torch.bfloat16)
        both = median_ms(lambda: torch.autograd.grad(attend(q), (q, k, v), grad))
        return {"forward ms": round(median_ms(lambda: attend(q)), 3), "forward+backward ms": round(both, 3)}

    def flash(q: torch.Tensor) -> torch.Tensor:
        from flash_attn import flash_attn_func

        return flash_attn_func(q[None], k[None], v[None], causal=True, window_size=(window - 1, 0))[0]

    table.attempt("FlashAttention-2, all queries", lambda: times(flash, total))
    for density in options.densities:
        hi = (torch.rand(total, device="cuda") < density).nonzero()[:, 0].int()
        lo = (hi - window + 1).clamp(min=0)
        n = len(hi)
        at = f"{density:.1%} selected"
        table.attempt(f"ours, {at}", lambda: times(lambda q: interval_attention(q, k, v, lo, hi), n))
        room_lo, room_hi = (torch.cat([t, t.new_full((total - n,), empty)]) for t, empty in ((lo, 1), (hi, 0)))
        table.attempt(
            f"ours, {at}, in a buffer for all",
            lambda: times(lambda q: interval_attention(q, k, v, room_lo, room_hi), total),
        )
        if not options.skip_flex:
            table.attempt(f"flex, {at}", lambda: times(flex_gathered(lo, hi, k, v), n))


def flex_gathered(lo: torch.Tensor, hi: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable:
    """flex_attention on gathered queries, its block mask made beforehand."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    n = len(lo)
    mask = torch.compile(create_block_mask)(
        lambda b, h, q, key: (key >= lo[q]) & (key <= hi[q]), None, None, n, len(k), device="cuda"
    )
    flex = torch.compile(flex_attention, dynamic=False)

    def attend(q: torch.Tensor) -> torch.Tensor:
        return flex(*(t.transpose(0, 1)[None] for t in (q, k, v)), block_mask=mask)[0].transpose(0, 1)

    return attend
