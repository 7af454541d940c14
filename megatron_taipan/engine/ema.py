"""An exponential moving average of the weights, float32, kept by whoever steps them.

It lies beside Adam's moments in the optimizer's state, so it is sharded, saved and laid out anew as they are. After
update n (n = 1, 2, ...) it is e <- b e + (1 - b) w with b = min(decay, (1 + n) / (10 + n)), as in Polyak averaging with
the warm-up of TensorFlow's ExponentialMovingAverage: the initial weights are soon forgotten.
"""

import torch
from torch import Tensor

from megatron_taipan.engine.state_shards import EMA, MASTER, StateShard


def begin_ema(shards: list[StateShard]) -> None:
    """The average begins as the weights are."""
    for shard in shards:
        state = shard.optimizer.state[shard.flat]
        if EMA not in state:
            state[EMA] = torch.empty_like(shard.flat, memory_format=torch.preserve_format).detach()
        shard.tensor(EMA).copy_(shard.tensor(MASTER))


@torch.no_grad()
def update_ema(shards: list[StateShard], decay: float, n: int) -> None:
    """After update number n of the weights; not after a skipped one. It does not wait for the device."""
    whole = {id(shard.flat): shard for shard in shards}.values()  # each tensor once, though many shards lie in it
    averages: list[Tensor] = [shard.optimizer.state[shard.flat][EMA] for shard in whole]
    torch._foreach_lerp_(averages, [shard.flat.detach() for shard in whole], 1 - min(decay, (1 + n) / (10 + n)))
