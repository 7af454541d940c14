"""The layers of a pattern, one class a letter. Each takes and returns the residual stream (see model/stream.py)."""

import torch
from torch import Tensor, nn

from megatron_taipan.layer_kinds.attention import FULL_ATTENTION, WINDOW_ATTENTION
from megatron_taipan.layer_kinds.mamba2 import MAMBA2
from megatron_taipan.layer_kinds.record import LayerKind
from megatron_taipan.layer_kinds.registry import kind_of
from megatron_taipan.layer_kinds.selective import SELECTIVE_ATTENTION
from megatron_taipan.model.attention import Attention
from megatron_taipan.model.build import Build
from megatron_taipan.model.cache import KeyValueStore, MambaState
from megatron_taipan.model.context import Context
from megatron_taipan.model.gate import Gate, Selection
from megatron_taipan.model.layers import StreamNorm, SwiGLU
from megatron_taipan.model.mamba2 import Mamba2
from megatron_taipan.model.stream import Measured, Stream

BLOCKS: dict[str, "type[Block]"] = {}  # by letter; see Block.__init_subclass__


class Block(nn.Module):
    """What every layer provides. In the subclasses' formulas h is the value of the stream: `Stream.total()`.

    A subclass names the kinds that it computes and becomes their block:

        class MambaBlock(Block, kinds=(MAMBA2,))

    Its `forward` takes the stream, the context and a decoding state, and returns the stream and what it measured: a
    `Measured` where its kinds have `metrics`, else None; in a step of one token a row it may be None for all.
    """

    def __init_subclass__(cls, kinds: tuple[LayerKind, ...] = (), **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        BLOCKS.update({kind.letter: cls for kind in kinds})

    def __init__(self, build: Build, prefix: str, layer: int):
        super().__init__()
        self.config, self.layer, self.kind = build.config, layer, kind_of(build.config.letters[layer])


def make_layers(build: Build) -> nn.ModuleList:
    """All layers of the pattern, in order."""
    return nn.ModuleList(make_layer(build, index) for index in range(build.config.n_layers))


def make_layer(build: Build, index: int) -> Block:
    """The layer that the pattern has at this place.

    Raises:
        KeyError: no block was written for its kind.
    """
    kind = kind_of(build.config.letters[index])
    if kind.letter not in BLOCKS:
        raise KeyError(f"no block computes {kind.name}s: import the module of one that names it as its kind")
    return BLOCKS[kind.letter](build, f"layers.{index}", index)


class MambaBlock(Block, kinds=(MAMBA2,)):
    """`M`: h + Mamba2(RMSNorm(h))."""

    def __init__(self, build: Build, prefix: str, layer: int):
        super().__init__(build, prefix, layer)
        self.norm = StreamNorm(build, f"{prefix}.norm")
        self.mixer = Mamba2(build, f"{prefix}.mixer")

    def forward(self, stream: Stream, ctx: Context, state: MambaState | None = None) -> tuple[Stream, None]:
        return self.mixer(stream, self.norm.__call__, ctx, state), None

    def new_state(self, batch: int, device, dtype) -> MambaState:
        return self.mixer.new_state(batch, device, dtype)


class AttentionBlock(Block, kinds=(WINDOW_ATTENTION, FULL_ATTENTION)):
    """`W` and `A`: h + Attention(RMSNorm(h)), then h + SwiGLU(RMSNorm(h))."""

    def __init__(self, build: Build, prefix: str, layer: int):
        super().__init__(build, prefix, layer)
        self.tp = build.tp
        window, rope = (build.config.attention.window, False) if self.kind.windowed else (None, True)
        self.norm = StreamNorm(build, f"{prefix}.norm")
        self.attention = Attention(build, f"{prefix}.attention", window=window, rope=rope)
        self.mlp_norm = StreamNorm(build, f"{prefix}.mlp_norm")
        self.mlp = SwiGLU(build, f"{prefix}.mlp")

    def forward(self, stream: Stream, ctx: Context, state: KeyValueStore | None = None) -> tuple[Stream, None]:
        u, h = self.norm(*stream)
        return self.mlp(stream.normed(h, self._attend(u, ctx, state)), self.mlp_norm.__call__), None

    def _attend(self, u: Tensor, ctx: Context, state: KeyValueStore | None) -> Tensor:
        """What attention adds to the stream, shaped as u."""
        if ctx.single:
            assert state is not None
            return self.attention.step(u, ctx, state)
        whole = self.tp.copy_to_tensor_parallel(u).view(ctx.batch, ctx.length, -1)
        (o,) = self.attention(whole, ctx, store=state)
        return self.tp.reduce_from_tensor_parallel(o.view(whole.shape))

    def new_state(self, batch: int, device, dtype) -> KeyValueStore:
        return self.attention.new_state(batch, device, dtype)


class SelectiveAttentionBlock(Block, kinds=(SELECTIVE_ATTENTION,)):
    """`S`: the gate picks tokens; those take alpha of a window attention's output; then SwiGLU for all.

        h_i <- h_i + m_i alpha_i (o_i - h_i)    with refinement "add": h_i + m_i alpha_i o_i
                                                with weight "one": 1 in place of alpha_i

    With gate gradient "selected" only the picked queries are computed. The cross-entropy gradient that would reach
    m_i of an unselected token is lost; with "all" every query is computed and that gradient is exact; with "sampled"
    some steps do one, some the other. The values are the same bit for bit, since picked queries are computed in the
    same call. An unselected token's o_i has a weight of 0, so nothing but m_i has a gradient by way of it: it is
    computed without one. With "all" the second call is of all tokens, without picking any: plain products and queries
    side by side cost less than those of the unselected rows alone. As one operation (`Attention.every_query`) there is
    no second call, and the values differ by rounding.
    """

    def __init__(self, build: Build, prefix: str, layer: int):
        super().__init__(build, prefix, layer)
        gate = build.config.gate
        self.tp, self.ops, self.gradient = build.tp, build.ops, gate.gradient
        self.adds, self.weighs = gate.refinement == "add", gate.weight == "alpha"
        self.norm = StreamNorm(build, f"{prefix}.norm")
        self.gate = Gate(build, f"{prefix}.gate", layer)
        window = build.config.attention.window
        self.attention = Attention(build, f"{prefix}.attention", window=window, rope=False, selects=True)
        self.mlp_norm = StreamNorm(build, f"{prefix}.mlp_norm")
        self.mlp = SwiGLU(build, f"{prefix}.mlp")

    def forward(
        self, stream: Stream, ctx: Context, state: KeyValueStore | None = None
    ) -> tuple[Stream, Measured | None]:
        u, h = self.norm(*stream)  # [b, l, d] or a shard of its tokens
        selection = self.gate(u, ctx)
        if selection.metrics is None:
            assert state is not None  # in a step
            return self._step(u, h, selection, ctx, state), None
        measured = Measured(selection.metrics, selection.budget_loss)
        u = self.tp.copy_to_tensor_parallel(u).view(ctx.batch, ctx.length, -1)
        chosen = selection.selected.flatten()  # [b * l]
        refine = self._weight(selection).to(h.dtype)
        every = self._every_query(ctx)
        if every is not True:  # what is not computed has no gradient
            refine = torch.where(self.tp.shard_sequence(selection.selected) | every, refine, 0)
        o = self._attend(u, chosen, every, ctx, state)
        h = self.ops.refine(h, o, refine, zero_is_unselected=every is False, add=self.adds)
        return self.mlp(Stream(h), self.mlp_norm.__call__), measured

    def _weight(self, selection: Selection) -> Tensor:
        """What a token takes of its attention output, 0 where it is not selected; shaped as m."""
        return selection.m * selection.alpha if self.weighs else selection.m

    def _every_query(self, ctx: Context) -> bool | Tensor:
        """Whether unselected queries are computed as well; only training uses them."""
        if not self.training or self.gradient != "sampled":
            return self.training and self.gradient == "all"
        return ctx.gate.every_query

    def _attend(
        self, u: Tensor, chosen: Tensor, every: bool | Tensor, ctx: Context, state: KeyValueStore | None
    ) -> Tensor:
        """The ranks' sum of W_O Attention, [b, l, d] or this rank's shard: of the chosen tokens [b * l], and of the
        others where every query is computed, else zeros there."""
        rows, n = self.ops.select_rows(u, chosen), len(chosen)
        if every is True and (o := self.attention.every_query(u, ctx, rows)) is not None:
            return self.tp.reduce_from_tensor_parallel(o.view(u.shape))
        if every is False:
            (o,) = self.attention(u, ctx, [rows], state)
            if self.tp.sequence_parallel:
                return self.tp.reduce_from_tensor_parallel(self.ops.scatter_rows(o, rows, n).view(u.shape))
            # Only computed rows are sent where every rank gets all of them. Where kernels pick the rows, the host does
            # not know their number and the whole buffer is sent, as large as the sequence.
            return self.ops.scatter_rows(self.tp.reduce_from_tensor_parallel(o), rows, n).view(u.shape)
        others = None if every is True else self.ops.select_rows(u, ~chosen & every)
        o, unlearned = self.attention(u, ctx, [rows], state, [others])
        unlearned = unlearned if others is None else self.ops.scatter_rows(unlearned, others, n)
        return self.tp.reduce_from_tensor_parallel(self.ops.scatter_rows(o, rows, n, unlearned).view(u.shape))

    def _step(self, u: Tensor, h: Tensor, selection: Selection, ctx: Context, state: KeyValueStore) -> Stream:
        """One more token a row, u and h [b, 1, d]: rows that are not selected read no keys; see Taipan.step."""
        o = self.attention.step(u, ctx, state, selection.selected[:, 0])
        h = self.ops.refine(h, o, self._weight(selection).to(h.dtype), zero_is_unselected=True, add=self.adds)
        return self.mlp(Stream(h), self.mlp_norm.__call__)

    def new_state(self, batch: int, device, dtype) -> KeyValueStore:
        return self.attention.new_state(batch, device, dtype)
