"""`python -m benchmarks layer`: one Mamba-2 layer against mamba_ssm's."""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.autotune import compile_ahead
from benchmarks.common import Table, add_out, kernel_times, median_ms
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.ops.dispatch import pick_ops


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    add_out(parser)
    parser.add_argument("--profile", action="store_true", help="also our kernels' times")


def run(options: argparse.Namespace) -> None:
    table = Table("layer", options.out)
    compile_ahead(2048, 4, 4096)  # the candidates of mamba_ssm's kernels
    for batch, length in ((4, 4096), (1, 32768)):
        x = torch.randn(batch, length, 2048, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn_like(x)
        table.attempt(f"ours, {batch} x {length}", lambda: layer_times(our_mamba_layer(), x, grad, options.profile))
        table.attempt(f"mamba_ssm, {batch} x {length}", lambda: layer_times(peer_mamba_layer(), x, grad, False))


def layer_times(layer: Callable, x: torch.Tensor, grad: torch.Tensor, profiled: bool) -> dict:
    def both() -> None:
        layer(x).backward(grad)

    numbers = {"forward ms": round(median_ms(lambda: layer(x)), 3), "forward+backward ms": round(median_ms(both), 3)}
    if profiled:
        for name, ms in kernel_times(both, 24).items():
            print(f"    {ms:9.3f} ms  {name}", flush=True)
    return numbers


def our_mamba_layer() -> Callable:
    """The mixer of the 1.3B preset, without its norm and so without what is fused with it."""
    from megatron_taipan.gate_config import GateConfig
    from megatron_taipan.model.context import make_context
    from megatron_taipan.model.gate_settings import settled
    from megatron_taipan.model.stream import Stream
    from megatron_taipan.model_config import ModelConfig

    config = ModelConfig(pattern="M", vocab_size=64, d_model=2048, d_ff=64)
    with torch.device("cuda"):
        mixer = Taipan(config, ops=replace(pick_ops("fast"), add_norm_linear=None)).bfloat16().layers[0].mixer

    def run(x: torch.Tensor) -> torch.Tensor:
        ctx = make_context(x[..., 0], None, None, 0, settled(GateConfig()))
        return mixer(Stream(x), lambda h, *_: (h, h), ctx).branch

    return run


def peer_mamba_layer() -> Callable:
    from mamba_ssm.modules.mamba2 import Mamba2

    return Mamba2(2048, d_state=128, headdim=64, expand=2, device="cuda", dtype=torch.bfloat16)
