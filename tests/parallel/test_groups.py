"""Groups of a layout, and their timeouts."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_taipan.errors import UserError
from megatron_taipan.parallel.groups import build_groups, data_parallel_size, set_timeouts
from tests.distributed.launch import launch


def places() -> tuple:
    """This rank's place in TP 2 x PP 2, the ranks of its groups, and all timeouts before and after set_timeouts."""
    groups = build_groups(world_size=4, rank=dist.get_rank(), tensor=2, pipeline=2, timeout_s=77)
    other = dist.new_group([0, 1, 2, 3])  # one that somebody else made, with the default timeout
    world = dist.distributed_c10d._world.pg_map

    def timeouts() -> set[timedelta]:
        return {g._get_backend(torch.device("cpu")).options._timeout for g in world}

    before = timeouts()
    set_timeouts(55)
    ranks = [dist.get_process_group_ranks(g) for g in (groups.tensor.group, groups.data_group, other)]
    return groups.tensor.rank, groups.data_rank, groups.pipeline_rank, ranks, before, timeouts()


def test_places_and_timeouts():
    results = launch(4, places)
    assert [r[:3] for r in results] == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]
    assert results[3][3][:2] == [[2, 3], [3]]
    for result in results:
        assert timedelta(seconds=77) in result[4] and len(result[4]) > 1
        assert result[5] == {timedelta(seconds=55)}


def test_world_that_does_not_fit_shows_the_arithmetic():
    with pytest.raises(UserError, match=r"6 processes cannot hold .*tensor=2 x .*pipeline=2 = 4 \(remainder 2\)"):
        data_parallel_size(6, 2, 2)
    assert data_parallel_size(8, 2, 2) == 2
