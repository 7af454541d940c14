"""The Mamba-2 mixer (arXiv 2405.21060, figure 6): projections, short convolution, SSD scan, gated norm."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_taipan.model.build import Build, KeepsFp32Params
from megatron_taipan.model.cache import MambaState
from megatron_taipan.model.context import Context
from megatron_taipan.model.fused_params import join_rows, products, take_rows
from megatron_taipan.model.layers import CallNorm, fuses_products
from megatron_taipan.model.stream import Stream
from megatron_taipan.ops.numerics import at_least_float32, wide_dtype
from megatron_taipan.ops.operations import takes_kernels
from megatron_taipan.ops.product import Weight, bare, product
from megatron_taipan.ops.ssd import ssd_step
from megatron_taipan.ops.tiles import fit_tiles


class Mamba2(KeepsFp32Params):
    """The mixer of an `M` layer. Each tensor rank holds whole heads; z, x and dt are split with them.

    Where the ranks outnumber the groups, every rank holds all of B and C, uses the group of its heads, and the
    gradients are summed; the norm's group is then spread over ranks, which add up their sums of squares.
    """

    read_together = (
        ("in_proj_z", "in_proj_x", "in_proj_B", "in_proj_C", "in_proj_dt"),
        ("conv_x_weight", "conv_B_weight", "conv_C_weight"),
        ("conv_x_bias", "conv_B_bias", "conv_C_bias"),
    )
    in_proj_z: Weight
    in_proj_x: Weight
    in_proj_B: Weight
    in_proj_C: Weight
    in_proj_dt: Weight
    conv_x_weight: Tensor
    conv_x_bias: Tensor
    conv_B_weight: Tensor
    conv_B_bias: Tensor
    conv_C_weight: Tensor
    conv_C_bias: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    norm_weight: Tensor
    out_proj: Weight

    def __init__(self, build: Build, prefix: str):
        super().__init__()
        config, m, tp = build.config, build.config.mamba, build.tp
        self.ops, self.tp, self.place = build.ops, tp, build.place
        self.inner, self.heads = config.d_inner // tp.size, config.mamba_heads // tp.size
        self.headdim, self.d_state, self.d_conv = m.headdim, m.d_state, m.d_conv
        self.chunk_size, self.eps, self.conv_bias = m.chunk_size, config.norm_eps, m.conv_bias
        self.group_size = config.d_inner // m.n_groups  # channels under one norm, over all ranks
        self.shared_groups = m.n_groups % tp.size != 0  # B and C are on every rank
        self.groups = 1 if self.shared_groups else m.n_groups // tp.size
        self.group = tp.rank * m.n_groups // tp.size if self.shared_groups else 0  # which of them this rank uses
        self.widths = [self.inner, self.inner + 2 * self.groups * self.d_state, self.heads]  # z, xBC, dt
        self.norm_spans_ranks = self.group_size > self.inner
        self.ranks_per_group = tp.size // m.n_groups if self.shared_groups else 1
        fits = fit_tiles(self.headdim, self.d_state) and self.d_conv <= 4
        self.fused = build.ops.mamba2_mix is not None and fits
        build.parameters(self, prefix)

    def forward(self, stream: Stream, norm: CallNorm, ctx: Context, state: MambaState | None = None) -> Stream:
        """h + Mamba2(u) of (u, h) = norm(*stream), [b, l, d] or this rank's shard of it; `state` is read and updated.

        The norm is called here since one operation can norm and project.
        """
        if ctx.single:
            assert state is not None
            u, h = norm(*stream)
            return stream.normed(h, self._step(u, state))
        in_proj, conv_weight, conv_bias = self._joined_weights()
        if len(in_proj) == 1 and fuses_products(self.tp, self.ops.add_norm_linear, stream.h, in_proj):
            zxbcdt, h = norm(*stream, self.ops.add_norm_linear, *in_proj)
        else:
            u, h = norm(*stream)
            parts = self.tp.column_parallel_linear(u, *in_proj)
            zxbcdt = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        zxbcdt = zxbcdt.view(ctx.batch, ctx.length, -1)
        if state is None and self.fused and takes_kernels(zxbcdt):
            return stream.normed(h, self._fused_mix(zxbcdt, conv_weight, conv_bias, ctx))
        return stream.normed(h, self._mix(zxbcdt, conv_weight, conv_bias, ctx, state))

    def _mix(
        self, zxbcdt: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, ctx: Context, state: MambaState | None
    ) -> Tensor:
        """What follows the first projection [b, l, z x B C dt], part by part."""
        z, xBC, dt = zxbcdt.split(self.widths, -1)
        initial_tail = state.conv_tail if state else None
        if self.place is not None:
            initial_tail = torch.where(self._known(ctx)[..., None], self.place.before(xBC, self.d_conv - 1), 0)
        xBC = self.ops.causal_conv1d(
            xBC, conv_weight, conv_bias, seq_idx=ctx.seq_idx, initial_tail=initial_tail, return_tail=state is not None
        )
        if state is not None:
            xBC, state.conv_tail = xBC
        x, B, C = self._heads(xBC)
        dt, A = F.softplus(at_least_float32(dt) + self.dt_bias), self._decay_rate()
        b, l = x.shape[:2]

        options = {"chunk_size": self.chunk_size, "D": self.D, "seq_idx": ctx.seq_idx}
        if self.place is not None:
            y = self.place.scan(self.ops.ssd, x, dt, A, B, C, ctx.document_start < ctx.position[0], **options)
        elif state is None:
            y = self.ops.ssd(x, dt, A, B, C, **options)
        elif l == 1:
            y, state.ssm = ssd_step(state.ssm, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], self.D)
            y = y[:, None]
        else:
            y, state.ssm = self.ops.ssd(x, dt, A, B, C, initial_state=state.ssm, return_state=True, **options)
        y = self._gated_norm(y.reshape(b, l, self.inner), z)
        return self.tp.row_parallel_linear(y, self.out_proj)

    def _step(self, u: Tensor, state: MambaState) -> Tensor:
        """One more token a row, u [b, 1, d], the state changed in place; see Taipan.step."""
        zxbcdt = products(u, self.in_proj_z, self.in_proj_x, self.in_proj_B, self.in_proj_C, self.in_proj_dt)
        z, xBC, dt = zxbcdt[:, 0].split(self.widths, -1)
        conv_weight = join_rows(self.conv_x_weight, self.conv_B_weight, self.conv_C_weight)
        conv_bias = join_rows(self.conv_x_bias, self.conv_B_bias, self.conv_C_bias) if self.conv_bias else None
        x, B, C = self._heads(self.ops.conv_update(state.conv_tail, xBC, conv_weight, conv_bias))
        y = self.ops.ssd_update(state.ssm, x, dt, self.dt_bias, self.A_log, B, C, self.D)
        return product(self._gated_norm(y.flatten(1), z)[:, None], self.out_proj)

    def _fused_mix(self, zxbcdt: Tensor, conv_weight: Tensor, conv_bias: Tensor | None, ctx: Context) -> Tensor:
        """As `_mix` from an empty state, or that of the piece before, as one operation; it projects too where this rank
        is alone."""
        assert self.ops.mamba2_mix is not None  # else `fused` is False
        out_proj = bare(self.out_proj)
        projects = self.place is None and fuses_products(self.tp, self.ops.mamba2_mix, zxbcdt, (out_proj,))
        mixed = self.ops.mamba2_mix(
            zxbcdt, conv_weight, conv_bias, self.dt_bias, self._decay_rate(), self.D, self.norm_weight,
            seq_idx=ctx.seq_idx, headdim=self.headdim, groups=self.groups, d_state=self.d_state,
            group_size=self.group_size, eps=self.eps, reduce_sum=self._reduce_sum,
            place=self.place, known=self._known(ctx) if self.place is not None else None,
            out_weight=out_proj if projects else None,
        )  # fmt: skip
        return mixed if projects else self.tp.row_parallel_linear(mixed, self.out_proj)

    def _known(self, ctx: Context) -> Tensor:
        """[b, d_conv - 1] whether each of the tokens just before this piece is of its first token's document."""
        before = ctx.position[:1] + torch.arange(1 - self.d_conv, 0, device=ctx.position.device)
        return before >= ctx.document_start[:, :1]

    def _heads(self, xBC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [..., h, p], B and C [..., g, n] of the convolution's output [..., channels]."""
        states = self.groups * self.d_state
        x, B, C = xBC.split([self.inner, states, states], -1)
        x = x.unflatten(-1, (self.heads, self.headdim))
        return x, *(t.unflatten(-1, (self.groups, self.d_state)) for t in (B, C))

    def _decay_rate(self) -> Tensor:
        """A [h], below 0."""
        return -at_least_float32(self.A_log).exp()

    def _joined_weights(self) -> tuple[tuple[Weight, ...], Tensor, Tensor | None]:
        """The components joined for one product and one convolution: rows z, x, B, C, dt and x, B, C.

        Modules in place of weights are called one by one instead, unless they are plain.
        """
        names = ["in_proj_B", "in_proj_C", "conv_B_weight", "conv_C_weight"]
        names += ["conv_B_bias", "conv_C_bias"] if self.conv_bias else []
        shared = tuple(getattr(self, name) for name in names)
        if self.shared_groups:
            first = self.group * self.d_state
            shared = tuple(take_rows(t, first, self.d_state) for t in self.tp.sum_gradients(*shared))
        in_B, in_C, conv_B, conv_C, *biases = shared
        in_proj = tuple(map(bare, (self.in_proj_z, self.in_proj_x, in_B, in_C, self.in_proj_dt)))
        tensors = [weight for weight in in_proj if isinstance(weight, Tensor)]
        joined = (join_rows(*tensors),) if len(tensors) == len(in_proj) else in_proj
        conv_weight = join_rows(self.conv_x_weight, conv_B, conv_C)
        conv_bias = join_rows(self.conv_x_bias, *biases) if self.conv_bias else None
        return joined, conv_weight, conv_bias

    def _gated_norm(self, y: Tensor, z: Tensor) -> Tensor:
        return self.ops.gated_rms_norm(
            y, z, self.norm_weight, eps=self.eps, group_size=self.group_size, reduce_sum=self._reduce_sum
        )

    @property
    def _reduce_sum(self) -> Callable[[Tensor], Tensor] | None:
        return self._sum_over_group if self.norm_spans_ranks else None

    def _sum_over_group(self, squares: Tensor) -> Tensor:
        """Adds up the sums of squares [..., 1, 1] of the ranks that share this rank's group.

        Differentiable, and its own adjoint: the kernels call it outside of autograd, for squares and for gradients.
        """
        if self.ranks_per_group == self.tp.size:
            return self.tp.sum_over_ranks(squares)
        # Several groups: each has its column, so that one all-reduce over the whole tensor group serves all.
        n_groups = self.tp.size // self.ranks_per_group
        columns = F.pad(squares, (self.group, n_groups - 1 - self.group))
        return self.tp.sum_over_ranks(columns)[..., self.group : self.group + 1]

    def new_state(self, batch: int, device, dtype) -> MambaState:
        """An empty state for `batch` rows."""
        return MambaState(
            torch.zeros(batch, self.d_conv - 1, self.widths[1], device=device, dtype=dtype),
            torch.zeros(batch, self.heads, self.headdim, self.d_state, device=device, dtype=wide_dtype(dtype)),
        )
