"""The head's cross entropy by cut-cross-entropy (arXiv 2411.09009), which never writes logits to memory.

Gradients are exact (`filter_eps=None`): by default it leaves out those below a bound, which is made for fine-tuning. It
adds them up in 16 bits, in an order that varies.
"""

from collections.abc import Callable

from torch import Tensor

from megatron_taipan.ops.libraries import load_library


def load_cut_cross_entropy() -> tuple[Callable, str]:
    """`linear_cross_entropy` for a vocabulary that is on one rank, and the package's version.

    Raises:
        UserError: the package cannot be used here.
    """
    module, version = load_library("cce", "cut_cross_entropy", "cross_entropy")

    def linear_cross_entropy(
        hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, *, vocab_start: int = 0,
        n_valid: int | None = None, reduce_sum: Callable | None = None, reduce_max: Callable | None = None,
    ) -> Tensor:  # fmt: skip
        if reduce_sum is not None or reduce_max is not None or vocab_start:
            raise ValueError("cut-cross-entropy knows no vocabulary that is split over ranks")
        losses = module.linear_cross_entropy(
            hidden, weight[:n_valid], labels, reduction="none", filter_eps=None, impl="cce"
        )
        return (losses.float() * token_weights.float()).sum()

    return linear_cross_entropy, version
