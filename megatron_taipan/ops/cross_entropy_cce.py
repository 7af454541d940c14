"""The head's cross entropy by cut-cross-entropy (arXiv 2411.09009), which never writes logits to memory.

Gradients are exact (`filter_eps=None`): by default it leaves out those below a bound, which is made for fine-tuning. It
adds them up in 16 bits, in an order that varies.
"""

from collections.abc import Callable

from torch import Tensor

from megatron_taipan.ops.libraries import load_library
from megatron_taipan.ops.token_losses import weighted_losses


def load_cut_cross_entropy() -> tuple[Callable, str]:
    """`linear_cross_entropy` for a vocabulary that is on one rank, and the package's version.

    Raises:
        UserError: the package cannot be used here.
    """
    module, version = load_library("cce", "cut_cross_entropy", "cross_entropy")

    def losses_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return module.linear_cross_entropy(hidden, weight, labels, reduction="none", filter_eps=None, impl="cce")

    return weighted_losses(losses_of, "cut-cross-entropy"), version
