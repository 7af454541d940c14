"""Embedding and head, the vocabulary split over tensor ranks (arXiv 1909.08053, section 3)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_taipan.model.build import Build
from megatron_taipan.parallel.collectives import (
    all_reduce_max,
    all_reduce_sum,
    copy_to_tensor_parallel,
    reduce_from_tensor_parallel,
)


class Embedding(nn.Module):
    """Rows of the embedding matrix; each rank holds a contiguous part of the ids, padding rows at the end."""

    weight: Tensor

    def __init__(self, build: Build, prefix: str):
        super().__init__()
        self.tp = build.tp
        build.parameters(self, prefix)

    def forward(self, tokens: Tensor) -> Tensor:
        """[b, l] ids -> [b, l, d], or this rank's shard [n/tp, d] of it."""
        if self.tp.size == 1:
            return F.embedding(tokens, self.weight)
        rows = self.weight.shape[0]
        local = tokens - self.tp.rank * rows
        here = (local >= 0) & (local < rows)
        found = F.embedding(torch.where(here, local, 0), self.weight)
        return reduce_from_tensor_parallel(torch.where(here[..., None], found, 0), self.tp)


class Head(nn.Module):
    """Logits or the cross entropy from hidden states; owns a weight only where it is not the embedding's."""

    weight: Tensor

    def __init__(self, build: Build, prefix: str):
        super().__init__()
        self.tp, self.vocab_size, self.cross_entropy = build.tp, build.config.vocab_size, build.ops.linear_cross_entropy
        build.parameters(self, prefix)

    def forward(
        self, h: Tensor, embedding: Tensor | None, labels: Tensor | None, token_weights: Tensor | None
    ) -> Tensor:
        """With labels [b, l] and h the normed stream, [b, l, d] or a shard: sum of token_weights * cross entropy, a
        scalar. Without, h [b, l, d] on every rank: logits [b, l, vocab] in float32."""
        weight = self.weight if hasattr(self, "weight") else embedding
        assert weight is not None  # a tied head is given the embedding's
        if labels is None:
            return self._logits(h, weight)
        assert token_weights is not None
        h = copy_to_tensor_parallel(h, self.tp)
        rows = weight.shape[0]
        start = self.tp.rank * rows
        return self.cross_entropy(
            h.flatten(0, -2),
            weight,
            labels.flatten(),
            token_weights.flatten(),
            vocab_start=start,
            n_valid=min(max(self.vocab_size - start, 0), rows),
            reduce_sum=self._sum if self.tp.size > 1 else None,
            reduce_max=self._max if self.tp.size > 1 else None,
        )

    def _sum(self, x: Tensor) -> Tensor:
        return all_reduce_sum(x, self.tp)

    def _max(self, x: Tensor) -> Tensor:
        return all_reduce_max(x, self.tp)

    def _logits(self, h: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(h, weight)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.tp.size == 1:
            return logits
        # For evaluation only: every rank fills in its columns and the sum joins them.
        rows = weight.shape[0]
        whole = logits.new_zeros(*logits.shape[:-1], rows * self.tp.size)
        whole[..., self.tp.rank * rows : (self.tp.rank + 1) * rows] = logits
        return all_reduce_sum(whole, self.tp)[..., : self.vocab_size]
