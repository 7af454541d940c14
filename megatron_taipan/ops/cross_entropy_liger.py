"""The head's cross entropy by Liger's fused linear cross entropy (`LigerFusedLinearCrossEntropyFunction`).

Tokens have weights of their own here, so the losses come back token by token (reduction "none"). Liger then computes
the logits a second time in the backward pass: four products where our kernel has three. Sums of the head's gradient
are float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_taipan.ops.libraries import load_library
from megatron_taipan.ops.token_losses import weighted_losses


def load_liger_cross_entropy() -> tuple[Callable, str]:
    """`linear_cross_entropy` for a vocabulary that is on one rank, and Liger's version.

    Raises:
        UserError: Liger cannot be used here.
    """
    module, version = load_library("liger", "liger_kernel.ops.fused_linear_cross_entropy", "cross_entropy")
    fused = module.LigerFusedLinearCrossEntropyFunction

    def losses_of(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        ignored, no_z_loss, no_smoothing = -100, 0.0, 0.0
        losses, *_ = fused.apply(
            hidden, weight, labels, None, None, ignored, no_z_loss, no_smoothing, "none", None, False, torch.float32,
        )  # fmt: skip
        return losses

    return weighted_losses(losses_of, "liger"), version
