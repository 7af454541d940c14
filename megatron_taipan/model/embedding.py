"""Embedding and head, the vocabulary split over tensor ranks (arXiv 1909.08053, section 3)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_taipan.model.build import Build
from megatron_taipan.model.stack import residual_stream
from megatron_taipan.ops.numerics import at_least_float32


class Embedding(nn.Module):
    """The residual stream as rows of the embedding matrix; each rank holds a contiguous part of the ids, padding rows
    at the end."""

    weight: Tensor

    def __init__(self, build: Build, prefix: str):
        super().__init__()
        self.tp, self.fp32 = build.tp, build.config.residual_fp32
        build.parameters(self, prefix)

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, l] ids -> [b, l, d], or this rank's shard [n/tp, d] of it."""
        return residual_stream(self._rows(tokens), fp32=self.fp32)

    def _rows(self, tokens: Tensor) -> Tensor:
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        rows = self.weight.shape[0]
        local = tokens - self.tp.rank * rows
        here = (local >= 0) & (local < rows)
        found = F.embedding(torch.where(here, local, 0), self.weight)
        return self.tp.reduce_from_tensor_parallel(torch.where(here[..., None], found, 0))


class Head(nn.Module):
    """Logits or the cross entropy from hidden states; owns a weight only where it is not the embedding's."""

    weight: Tensor

    def __init__(self, build: Build, prefix: str):
        super().__init__()
        self.tp, self.vocab_size, self.cross_entropy = build.tp, build.config.vocab_size, build.ops.linear_cross_entropy
        build.parameters(self, prefix)

    def forward(
        self,
        h: Tensor,
        embedding: Tensor | None,
        labels: Tensor | None,
        token_weights: Tensor | None,
        parts: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """With labels [b, l] and h the normed stream, [b, l, d] or a shard: sum of token_weights * cross entropy, a
        scalar. Without, h [b, l, d] on every rank: logits [b, l, vocab] in float32.

        Args:
            parts: of the b * l tokens, flattened, [n_i] indices each, the same on every tensor rank; given: the sum of
                each part, [number of parts], in place of the sum of all tokens.
        """
        weight = self.weight if hasattr(self, "weight") else embedding
        assert weight is not None  # a tied head is given the embedding's
        if labels is None:
            return self._logits(h, weight)
        assert token_weights is not None
        h = self.tp.copy_to_tensor_parallel(h).flatten(0, -2)
        labels, token_weights = labels.flatten(), token_weights.flatten()
        if parts is None:
            return self._cross_entropy(h, weight, labels, token_weights)
        return torch.stack([self._cross_entropy(h[part], weight, labels[part], token_weights[part]) for part in parts])

    def _cross_entropy(self, h: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor) -> Tensor:
        if len(labels) == 0:  # a part of a short row; kernels are not launched on nothing
            return at_least_float32(h.new_zeros(()))
        rows = weight.shape[0]
        start = self.tp.rank * rows
        return self.cross_entropy(
            h,
            weight,
            labels,
            token_weights,
            vocab_start=start,
            n_valid=min(max(self.vocab_size - start, 0), rows),
            reduce_sum=self.tp.all_reduce_sum if self.tp.size > 1 else None,
            reduce_max=self.tp.all_reduce_max if self.tp.size > 1 else None,
        )

    def _logits(self, h: Tensor, weight: Tensor) -> Tensor:
        logits = at_least_float32(F.linear(h, weight))
        if self.tp.size == 1:
            return logits
        # For evaluation only: every rank fills in its columns and the sum joins them.
        rows = weight.shape[0]
        whole = logits.new_zeros(*logits.shape[:-1], rows * self.tp.size)
        whole[..., self.tp.rank * rows : (self.tp.rank + 1) * rows] = logits
        return self.tp.all_reduce_sum(whole)[..., : self.vocab_size]
