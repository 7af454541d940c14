"""Cross entropy of a linear head without all logits in memory, on one rank or with the vocabulary split over ranks.

The gradients are computed in the forward pass, chunk by chunk, while a chunk's logits exist; the backward pass
only scales them (the idea of Liger's fused linear cross entropy, arXiv 2410.10989). The vocabulary-parallel form
follows Megatron-LM (arXiv 1909.08053, section 3): ranks exchange only per-token scalars.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_taipan.ops.numerics import at_least_float32, wide_dtype

CHUNK_ELEMENTS = 1 << 25  # logits per chunk: 128 MiB in float32


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    *,
    vocab_start: int = 0,
    n_valid: int | None = None,
    reduce_sum: Callable[[Tensor], Tensor] | None = None,
    reduce_max: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """sum_i token_weights[i] * -log softmax(hidden_i weight^T)[labels_i].

    Args:
        hidden: [n, d]; weight: [v, d], this rank's rows of the head; labels: [n] ids of the whole vocabulary.
        token_weights: [n] float32; no gradient flows to them.
        vocab_start: id of weight's first row.
        n_valid: rows of weight that belong to a token; the rest is padding. None: all.
        reduce_sum, reduce_max: plain all-reduces over the ranks that have the other rows; None: this rank has all.

    Returns:
        A scalar in float32 (float64 for float64 input), the same on every rank. The gradient of hidden is this
        rank's part: the caller sums it over the ranks.
    """
    return _LinearCrossEntropy.apply(
        hidden, weight, labels, token_weights, vocab_start, n_valid, reduce_sum or _identity, reduce_max or _identity
    )


def fp16_lift(token_weights: Tensor, dtype: torch.dtype) -> Tensor | None:
    """The power of two, as a 0-dim float32 tensor, that scales the largest token weight to [1, 2); only in fp16, else
    None.

    The gradients of logits are token weights times probabilities, and they are rounded before the loss scaler of fp16
    can reach them: with weights of 1 / (tokens of a batch) most would fall below its smallest number, 6e-8.
    """
    if dtype != torch.float16:
        return None
    largest = token_weights.float().amax().clamp(min=2.0**-100)
    return torch.exp2(-largest.log2().floor())


def scale_gradients(
    upstream: Tensor, lift: Tensor | None, grad_hidden: Tensor | None, grad_weight: Tensor | None, weight_dtype
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients saved in the forward pass times the upstream gradient, in their own types."""
    if lift is not None:
        factor = upstream / lift  # fp16 can represent neither a loss scale of 2^16 nor small factors
        grad_hidden = (grad_hidden.float() * factor).to(grad_hidden.dtype) if grad_hidden is not None else None
        grad_weight = (grad_weight * factor).to(weight_dtype) if grad_weight is not None else None
        return grad_hidden, grad_weight
    if grad_hidden is not None:
        grad_hidden = grad_hidden * upstream.to(grad_hidden.dtype)
    if grad_weight is not None:  # rounded as it is multiplied: it is the largest gradient, and float32
        into = torch.empty_like(grad_weight, dtype=weight_dtype)
        grad_weight = torch.mul(grad_weight, upstream, out=into)
    return grad_hidden, grad_weight


def _identity(x: Tensor) -> Tensor:
    return x


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, token_weights, vocab_start, n_valid, reduce_sum, reduce_max):
        n, v = hidden.shape[0], weight.shape[0]
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        wide = wide_dtype(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs_weight else None
        lift = fp16_lift(token_weights, hidden.dtype)
        step = max(1, min(n, CHUNK_ELEMENTS // v))
        sums = torch.zeros(-(-n // step), dtype=wide, device=hidden.device)  # by chunk: a running sum would drift
        for chunk, start in enumerate(range(0, n, step)):
            rows = slice(start, min(start + step, n))
            h, scale = hidden[rows], token_weights[rows].to(wide)
            logits = at_least_float32(h @ weight.t())  # [m, v]
            if n_valid is not None and n_valid < v:
                logits[:, n_valid:] = float("-inf")
            top = reduce_max(logits.amax(-1))  # [m]
            logits -= top[:, None]
            local = labels[rows] - vocab_start
            here = (local >= 0) & (local < v)
            index = local.clamp(0, v - 1)[:, None]
            target = torch.where(here, logits.gather(1, index)[:, 0], 0)
            exp = logits.exp_()
            norm, target = reduce_sum(torch.stack([exp.sum(-1), target]))
            sums[chunk] = ((norm.log() - target) * scale).sum()
            if not (needs_hidden or needs_weight):
                continue
            if lift is not None:
                scale = scale * lift
            grad = exp.mul_((scale / norm)[:, None])  # d total / d logits = scale * (softmax - one-hot)
            grad.scatter_add_(1, index, torch.where(here, -scale, 0)[:, None])
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if needs_weight:
                grad_weight += (grad.t() @ h).to(wide)
        ctx.save_for_backward(grad_hidden, grad_weight, lift)
        ctx.weight_dtype = weight.dtype
        return sums.sum()

    @staticmethod
    def backward(ctx, upstream):
        grad_hidden, grad_weight, lift = ctx.saved_tensors
        gradients = scale_gradients(upstream, lift, grad_hidden, grad_weight, ctx.weight_dtype)
        return *gradients, None, None, None, None, None, None
