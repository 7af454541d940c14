"""Small layers that every block uses: norms and SwiGLU."""

from torch import Tensor, nn

from megatron_taipan.model.build import Build
from megatron_taipan.ops.product import Weight


class RMSNorm(nn.Module):
    """RMSNorm of the residual stream; the result has the weight's dtype, in which the layer computes."""

    weight: Tensor

    def __init__(self, build: Build, prefix: str):
        super().__init__()
        self.tp, self.eps, self.norm = build.tp, build.config.norm_eps, build.ops.rms_norm
        build.parameters(self, prefix)

    def forward(self, h: Tensor) -> Tensor:
        (weight,) = self.tp.stream_parameters(self.weight)
        return self.norm(h, weight, self.eps)


class StreamNorm(nn.Module):
    """(norm(h + branch), h + branch): adds to the residual stream and norms it, so that one kernel can do both.

    The kernel reads and writes the stream once; in the backward pass it adds the stream's gradient as well.
    """

    weight: Tensor

    def __init__(self, build: Build, prefix: str):
        super().__init__()
        self.tp, self.eps, self.add_norm = build.tp, build.config.norm_eps, build.ops.add_rms_norm
        build.parameters(self, prefix)

    def forward(self, h: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        (weight,) = self.tp.stream_parameters(self.weight)
        return self.add_norm(h, branch, weight, self.eps)


class SwiGLU(nn.Module):
    """down(silu(gate(u)) * up(u)), arXiv 2002.05202; column- and row-split over tensor ranks."""

    gate_proj: Weight
    up_proj: Weight
    down_proj: Weight

    def __init__(self, build: Build, prefix: str):
        super().__init__()
        self.tp, self.silu_mul = build.tp, build.ops.silu_mul
        build.parameters(self, prefix)

    def forward(self, u: Tensor) -> Tensor:
        gated = self.silu_mul(*self.tp.column_parallel_linear(u, self.gate_proj, self.up_proj))  # [.., d_ff]
        return self.tp.row_parallel_linear(gated, self.down_proj)
