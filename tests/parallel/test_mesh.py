"""Ranks by named axes, against numpy's order of an array's elements and DeepSpeed's topology."""

from itertools import product

import numpy as np
import pytest
import torch

from megatron_taipan.engine.startup import import_deepspeed
from megatron_taipan.errors import UserError
from megatron_taipan.parallel.mesh import AXES, ZERO, Coordinates, Mesh, fit_mesh
from megatron_taipan.parallel_config import ParallelConfig

MESHES = [Mesh(*sizes) for sizes in product((1, 2, 3), (1, 2, 4), (1, 2), (1, 2, 4))]
SOME_AXES = [("tensor",), ("data",), ("context",), ("pipeline",), ZERO, ("data", "context", "tensor"), AXES]


def test_ranks_are_numbered_as_elements_of_an_array_with_tensor_last():
    for mesh in MESHES:
        compare_with_numpy(mesh)


def compare_with_numpy(mesh: Mesh) -> None:
    ranks = np.arange(mesh.size()).reshape(mesh.pipeline, mesh.data, mesh.context, mesh.tensor)
    for at in np.ndindex(ranks.shape):
        assert mesh.coordinates(int(ranks[at])) == at
        assert mesh.rank_at(Coordinates(*at)) == ranks[at]
    for axes in SOME_AXES:
        which = [AXES.index(axis) for axis in axes]
        others = [k for k in range(4) if k not in which]
        groups = ranks.transpose(others + which).reshape(-1, mesh.size(*axes))
        assert mesh.groups(*axes) == groups.tolist(), axes
        assert mesh.groups(*reversed(axes)) == groups.tolist(), "the order in which axes are named says nothing"
        for group in groups:
            assert [mesh.index(int(rank), *axes) for rank in group] == list(range(len(group)))


def test_sixteen_ranks_by_hand():
    mesh = Mesh(pipeline=2, data=2, context=2, tensor=2)
    assert mesh.groups("tensor") == [[2 * n, 2 * n + 1] for n in range(8)]
    assert mesh.groups("context") == [[0, 2], [1, 3], [4, 6], [5, 7], [8, 10], [9, 11], [12, 14], [13, 15]]
    assert mesh.groups("data") == [[0, 4], [1, 5], [2, 6], [3, 7], [8, 12], [9, 13], [10, 14], [11, 15]]
    assert mesh.groups(*ZERO) == [[0, 2, 4, 6], [1, 3, 5, 7], [8, 10, 12, 14], [9, 11, 13, 15]]
    assert mesh.coordinates(13) == Coordinates(pipeline=1, data=1, context=0, tensor=1)
    # rank 3 reads the samples of rank 0, and holds the second of four shards
    assert [mesh.index(rank, "data") for rank in (0, 3, 4)] == [0, 0, 1]
    assert [mesh.index(rank, *ZERO) for rank in (0, 3, 4)] == [0, 1, 2]


def test_deepspeed_puts_the_ranks_of_a_pipeline_in_the_same_places():
    import_deepspeed(torch.device("cpu"))
    for mesh in MESHES:
        compare_with_topology(mesh)


def compare_with_topology(mesh: Mesh) -> None:
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(num_pp=mesh.pipeline, num_mp=mesh.tensor, num_dp=mesh.size(*ZERO))
    for rank in range(mesh.size()):
        there = topology.get_coord(rank)
        assert (there.pipe, there.model) == (mesh.index(rank, "pipeline"), mesh.index(rank, "tensor"))
        assert there.data == mesh.index(rank, *ZERO)
    assert sorted(topology.get_axis_comm_lists("data")) == sorted(mesh.groups(*ZERO))
    assert sorted(topology.get_axis_comm_lists("model")) == sorted(mesh.groups("tensor"))


def test_a_rank_outside_is_an_error():
    for rank in (-1, 4):
        with pytest.raises(ValueError, match=rf"rank {rank} is not in Mesh\(.*tensor=2\) \(0 to 3\)"):
            Mesh(data=2, tensor=2).coordinates(rank)


def test_world_that_does_not_fit_shows_the_arithmetic():
    with pytest.raises(UserError, match=r"6 processes cannot hold .*tensor=2 x .*pipeline=2 = 4 \(remainder 2\)"):
        fit_mesh(6, ParallelConfig(tensor=2, pipeline=2))
    with pytest.raises(UserError, match="0 processes"):
        fit_mesh(0, ParallelConfig())
    assert fit_mesh(24, ParallelConfig(tensor=2, pipeline=3)) == Mesh(pipeline=3, data=4, tensor=2)
