"""Timeouts of process groups, also of those that DeepSpeed opened."""

from datetime import timedelta

import torch.distributed as dist


def set_timeouts(timeout_s: float) -> None:
    """Gives every process group of this process the timeout, also those that DeepSpeed made with its own."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)
