"""What other projects' fused cross entropies share: losses token by token, of a vocabulary that is on one rank."""

from collections.abc import Callable

from torch import Tensor

from megatron_taipan.ops.numerics import at_least_float32


def weighted_losses(losses_of: Callable[[Tensor, Tensor, Tensor], Tensor], library: str) -> Callable:
    """`linear_cross_entropy` (see cross_entropy.py) by a library's losses of single tokens.

    Args:
        losses_of: [n] losses of hidden [n, d], weight [v, d] and labels [n].
    """

    def linear_cross_entropy(
        hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, *, vocab_start: int = 0,
        n_valid: int | None = None, reduce_sum: Callable | None = None, reduce_max: Callable | None = None,
    ) -> Tensor:  # fmt: skip
        if reduce_sum is not None or reduce_max is not None or vocab_start:
            raise ValueError(f"{library} knows no vocabulary that is split over ranks")
        losses = at_least_float32(losses_of(hidden, weight[:n_valid], labels))
        return (losses * token_weights.to(losses.dtype)).sum()

    return linear_cross_entropy
