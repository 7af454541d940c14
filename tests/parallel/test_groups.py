"""The process groups of a rank, opened by four processes."""

import torch.distributed as dist

from megatron_taipan.parallel.groups import build_groups
from megatron_taipan.parallel.mesh import Mesh
from tests.distributed.launch import launch

MESHES = [Mesh(pipeline=2, tensor=2), Mesh(context=2, tensor=2), Mesh(data=2, context=2), Mesh(data=4)]


def places() -> list[tuple]:
    """Of each mesh: (tensor, data, zero, pipeline) ranks, and the ranks of the tensor and ZeRO groups."""
    result = []
    for mesh in MESHES:
        g = build_groups(mesh)
        ranks = [dist.get_process_group_ranks(group) for group in (g.tensor.group, g.zero_group)]
        assert dist.get_group_rank(g.zero_group, dist.get_rank()) == g.zero_rank
        assert (dist.get_world_size(g.zero_group), dist.get_world_size(g.tensor.group)) == (g.zero_size, g.tensor.size)
        result.append(((g.tensor.rank, g.data_rank, g.zero_rank, g.pipeline_rank), *ranks))
    try:
        build_groups(Mesh(data=3))
    except ValueError as error:
        result.append(str(error))
    return result


def test_places_and_members():
    stages, contexts, both, data, fault = zip(*launch(4, places), strict=True)
    assert [place for place, *_ in stages] == [(0, 0, 0, 0), (1, 0, 0, 0), (0, 0, 0, 1), (1, 0, 0, 1)]
    assert [members for _, *members in stages] == [[[0, 1], [0]], [[0, 1], [1]], [[2, 3], [2]], [[2, 3], [3]]]
    # context ranks read the same samples and hold other shards of the state
    assert [place for place, *_ in contexts] == [(0, 0, 0, 0), (1, 0, 0, 0), (0, 0, 1, 0), (1, 0, 1, 0)]
    assert [zero for *_, zero in contexts] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [place for place, *_ in both] == [(0, 0, 0, 0), (0, 0, 1, 0), (0, 1, 2, 0), (0, 1, 3, 0)]
    assert [place for place, *_ in data] == [(0, rank, rank, 0) for rank in range(4)]
    assert all("4 processes do not fill" in text and "3 ranks" in text for text in fault)
