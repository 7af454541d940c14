"""The learning rate: linear warm-up, then a cosine down to min_lr."""

import math

from megatron_taipan.config import OptimConfig


def learning_rate(step: int, optim: OptimConfig, total_steps: int) -> float:
    """The learning rate of one optimizer step; a pure function, so that a resumed run needs no scheduler state.

    Args:
        step: steps already taken, so the first step is 0 and gets 1/warmup_steps of the peak.
        total_steps: where min_lr is reached if `optim.decay_steps` is null.
    """
    taken = step + 1
    if taken <= optim.warmup_steps:
        return optim.lr * taken / optim.warmup_steps
    end = optim.decay_steps or total_steps
    if taken >= end:
        return optim.min_lr
    progress = (taken - optim.warmup_steps) / (end - optim.warmup_steps)
    return optim.min_lr + (optim.lr - optim.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
