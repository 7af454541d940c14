"""Attention of the layers S, W and A: selected queries over every key of their interval."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_taipan.model.build import Build
from megatron_taipan.model.cache import KeyValueStore
from megatron_taipan.model.context import Context
from megatron_taipan.model.fused_params import products, take_rows
from megatron_taipan.ops.operations import takes_kernels
from megatron_taipan.ops.product import Weight, product
from megatron_taipan.ops.rope import rotary_tables
from megatron_taipan.ops.selected_rows import Rows
from megatron_taipan.ops.tiles import fit_tiles


class Attention(nn.Module):
    """Projections and attention, heads split over tensor ranks.

    Where the ranks outnumber the key-value heads, every rank holds all of k_proj and v_proj, uses the head that its
    query heads share, and the gradients are summed.
    """

    read_together = (("q_proj", "k_proj", "v_proj"),)
    q_proj: Weight
    k_proj: Weight
    v_proj: Weight
    out_proj: Weight

    def __init__(self, build: Build, prefix: str, *, window: int | None, rope: bool, selects: bool = False):
        """selects: queries are those of picked tokens, which `causal_attention` of another project may not serve."""
        super().__init__()
        config, tp = build.config, build.tp
        self.tp, self.ops, self.place = tp, build.ops, build.place
        self.causal_attention = None if selects else build.ops.causal_attention
        self.fused = build.ops.every_query is not None and selects and not rope and fit_tiles(config.head_dim)
        self.window, self.head_dim = window, config.head_dim
        self.theta = config.attention.rope_theta if rope else None
        self.heads = config.attention.n_heads // tp.size
        self.shared_kv = config.n_kv_heads % tp.size != 0
        self.kv_heads = 1 if self.shared_kv else config.n_kv_heads // tp.size
        self.kv_head = tp.rank * config.n_kv_heads // tp.size if self.shared_kv else 0
        build.parameters(self, prefix)

    def forward(
        self,
        u: Tensor,
        ctx: Context,
        queries: Sequence[Rows | None] = (None,),
        store: KeyValueStore | None = None,
        unlearned: Sequence[Rows | None] = (),
    ) -> list[Tensor]:
        """This rank's part of W_O Attention(q, K, V), for each group of queries; the caller sums over the ranks.

        Args:
            u: [b, l, d], the whole sequence.
            queries: groups of tokens whose queries are computed, each as picked rows of b * l; None means all
                tokens.
            store: keys and values of earlier tokens; the new ones are added.
            unlearned: more such groups, for their values alone: no gradient passes through them.

        Returns:
            [n, d] for each group, those of `unlearned` last: of all tokens, or a buffer that holds the picked rows in
            front.
        """
        within = (ctx.position - ctx.document_start).reshape(-1)  # [b * l] position inside the document
        k, v = (product(u, w).unflatten(-1, (self.kv_heads, self.head_dim)) for w in self._key_value_weights())
        k = self._rotate(k.flatten(0, 1), within).view_as(k)
        keys, values, first = (k, v, 0) if store is None else store.append(k, v)  # [b, s, hk, head_dim]
        if self.place is not None:
            keys, values, first = self._join_earlier(keys, values, ctx)
        lo, hi = (t.reshape(-1) for t in ctx.interval(self.window, keys.shape[1], first))  # [b * l]
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)

        def attend(rows: Rows | None) -> Tensor:
            if rows is None:
                q, low, high, place = product(u.flatten(0, 1), self.q_proj), lo, hi, within
            else:
                q = self.ops.gather_linear(u.flatten(0, 1), self.q_proj, rows)
                (low, high), place = rows.intervals(lo, hi), within[rows.at]
            q = q.unflatten(-1, (self.heads, self.head_dim))  # [n, hq, head_dim]
            q = self._rotate(q, place)
            whole = rows is None and store is None and self.place is None
            if whole and self.causal_attention is not None and takes_kernels(q):
                o = self.causal_attention(q, keys, values, ctx.document_start, self.window).flatten(1)
            else:
                o = self.ops.interval_attention(q, keys, values, low, high).flatten(1)
            return product(o, self.out_proj) if rows is None else self.ops.bounded_linear(o, self.out_proj, rows)

        outputs = [attend(rows) for rows in queries]
        with torch.no_grad():
            return outputs + [attend(rows) for rows in unlearned]

    def every_query(self, u: Tensor, ctx: Context, learned: Rows) -> Tensor | None:
        """This rank's part of W_O Attention(q, K, V) of all tokens [n, d] as one operation, with gradients from the
        `learned` ones alone; None where it does not run as one. In `forward` that is `[learned]` and, unlearned, None.
        """
        if not self.fused or self.place is not None or learned.n_valid is None or not takes_kernels(u):
            return None
        weights = (self.q_proj, *self._key_value_weights(), self.out_proj)
        if not all(isinstance(weight, Tensor) for weight in weights):
            return None
        assert self.ops.every_query is not None  # else `fused` is False
        lo, hi = (t.reshape(-1) for t in ctx.interval(self.window, u.shape[1], 0))  # [b * l]
        return self.ops.every_query(u.flatten(0, 1), *weights, lo, hi, learned, self.head_dim)

    def step(self, u: Tensor, ctx: Context, store: KeyValueStore, chosen: Tensor | None = None) -> Tensor:
        """W_O Attention(q, K, V) of one more token a row, the cache changed in place; see Taipan.step.

        Args:
            u: [b, 1, d]; chosen: bool [b], the rows that attend (None: all). The others' outputs are zeros.

        Returns:
            [b, 1, d], this rank's part.
        """
        start = ctx.document_start[:, 0]  # [b]
        heads = products(u, self.q_proj, self.k_proj, self.v_proj)[:, 0].unflatten(-1, (-1, self.head_dim))
        qk, v = heads.split([self.heads + self.kv_heads, self.kv_heads], 1)
        if self.theta is not None:
            if ctx.rotary is None:
                ctx.rotary = rotary_tables(ctx.position - start, self.head_dim, self.theta, u.dtype)
            qk = self.ops.rotate(qk, *ctx.rotary)
        q, k = qk.split([self.heads, self.kv_heads], 1)
        o = self.ops.decode_attention(q, k, v, *store.buffers(), ctx.position, start, self.window, chosen)
        return product(o.flatten(1), self.out_proj)[:, None]

    def _join_earlier(self, keys: Tensor, values: Tensor, ctx: Context) -> tuple[Tensor, Tensor, int]:
        """With the keys and values of earlier pieces in front, as far back as the window reaches, and the position of
        the first; what is before the row, or of another document, is in no token's interval."""
        assert self.place is not None
        reach = self.place.reach(ctx.length, self.window)
        keys, values = self.place.join_earlier(reach, keys, values)
        return keys, values, ctx.begin - reach

    def _key_value_weights(self) -> tuple[Weight, Weight]:
        """The matrices of the key-value heads that this rank uses."""
        if not self.shared_kv:
            return self.k_proj, self.v_proj
        k_proj, v_proj = self.k_proj, self.v_proj
        assert isinstance(k_proj, Tensor) and isinstance(v_proj, Tensor)  # only on one rank are weights modules
        first = self.kv_head * self.head_dim
        k_proj, v_proj = (take_rows(t, first, self.head_dim) for t in self.tp.sum_gradients(k_proj, v_proj))
        return k_proj, v_proj

    def _rotate(self, x: Tensor, position: Tensor) -> Tensor:
        """Queries or keys [n, heads, head_dim] turned by their tokens' places [n] where the layer turns any."""
        if self.theta is None:
            return x
        return self.ops.rotate(x, *rotary_tables(position, self.head_dim, self.theta, x.dtype))

    def new_state(self, batch: int, device, dtype) -> KeyValueStore:
        """An empty cache for `batch` rows."""
        return KeyValueStore(batch, self.kv_heads, self.head_dim, self.window, device, dtype)
