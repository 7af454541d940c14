"""Timeouts of all process groups, whoever opened them."""

from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_taipan.engine.timeouts import set_timeouts
from megatron_taipan.parallel.groups import build_groups
from megatron_taipan.parallel.mesh import Mesh
from tests.distributed.launch import launch


def timeouts_before_and_after() -> tuple[set[timedelta], set[timedelta]]:
    build_groups(Mesh(tensor=2), timeout_s=77)
    dist.new_group([0, 1])  # one that somebody else made, with the default timeout

    def timeouts() -> set[timedelta]:
        groups = dist.distributed_c10d._world.pg_map
        return {g._get_backend(torch.device("cpu")).options._timeout for g in groups}

    before = timeouts()
    set_timeouts(55)
    return before, timeouts()


def test_every_group_gets_the_timeout():
    for before, after in launch(2, timeouts_before_and_after):
        assert timedelta(seconds=77) in before and len(before) > 1
        assert after == {timedelta(seconds=55)}
