"""Small layers that every block uses: norms and SwiGLU."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from megatron_taipan.model.build import Build
from megatron_taipan.model.stream import Stream
from megatron_taipan.ops.operations import takes_kernels
from megatron_taipan.ops.product import Weight, bare
from megatron_taipan.parallel.one_rank import OneRank


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

    def forward(
        self,
        h: Tensor,
        branch: Tensor | None = None,
        kept: bool = False,
        fused: Callable | None = None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """With `fused`, an operation that goes on with these weights after the norm: its result in the norm's place.

        kept: as in `Stream`.
        """
        (weight,) = self.tp.stream_parameters(self.weight)
        return (fused or self.add_norm)(h, branch, weight, *weights, self.eps, kept)


# A StreamNorm's call. Not the module: accelerate's hooks move every argument that has a `to`, and where weights are
# elsewhere until they are used a norm would have none to move.
CallNorm = Callable[..., tuple[Tensor, Tensor]]


def fuses_products(tp: OneRank, fused: Callable | None, x: Tensor, weights: Sequence[Weight]) -> bool:
    """Whether an operation that includes products takes x and these weights: on one rank, where they are matrices."""
    matrices = all(isinstance(weight, Tensor) for weight in weights)
    return fused is not None and tp.size == 1 and matrices and takes_kernels(x)


class SwiGLU(nn.Module):
    """h + down(silu(gate(u)) * up(u)), arXiv 2002.05202; column- and row-split over tensor ranks."""

    gate_proj: Weight
    up_proj: Weight
    down_proj: Weight

    def __init__(self, build: Build, prefix: str):
        super().__init__()
        self.tp, self.silu_mul, self.add_norm_swiglu = build.tp, build.ops.silu_mul, build.ops.add_norm_swiglu
        build.parameters(self, prefix)

    def forward(self, stream: Stream, norm: CallNorm) -> Stream:
        """Of (u, h) = norm(*stream), which is called here since one operation can do all of it."""
        weights = [bare(weight) for weight in (self.gate_proj, self.up_proj, self.down_proj)]
        if fuses_products(self.tp, self.add_norm_swiglu, stream.h, weights):
            out, h = norm(*stream, self.add_norm_swiglu, *weights)
            return stream.normed(h, out)
        u, h = norm(*stream)
        gated = self.silu_mul(*self.tp.column_parallel_linear(u, self.gate_proj, self.up_proj))  # [.., d_ff]
        return stream.normed(h, self.tp.row_parallel_linear(gated, self.down_proj))
