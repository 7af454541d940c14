"""The process groups of a run, and this rank's place in each; which ranks they hold is the mesh's answer."""

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_taipan.parallel.context import ContextParallel
from megatron_taipan.parallel.mesh import ZERO, Mesh
from megatron_taipan.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class Groups:
    """This rank in the mesh."""

    mesh: Mesh
    rank: int
    tensor: TensorParallel
    zero_group: Any  # data x context: averages gradients, sums losses, shares ZeRO's state
    context: ContextParallel | None = None  # which piece of its rows; None: every rank holds whole rows

    @property
    def data_size(self) -> int:
        """Parts of a global batch."""
        return self.mesh.data

    @property
    def data_rank(self) -> int:
        """Whose part this rank reads; the same for all context, tensor and pipeline ranks of a part."""
        return self.mesh.index(self.rank, "data")

    @property
    def zero_size(self) -> int:
        """Ranks that hold the same parameters."""
        return self.mesh.size(*ZERO)

    @property
    def zero_rank(self) -> int:
        """This rank's number among them: which shard of the state ZeRO leaves here."""
        return self.mesh.index(self.rank, *ZERO)

    @property
    def pipeline_size(self) -> int:
        return self.mesh.pipeline

    @property
    def pipeline_rank(self) -> int:
        """This rank's stage."""
        return self.mesh.index(self.rank, "pipeline")


def group_of_stage(groups: Groups) -> Any:
    """The ranks of this rank's pipeline stage; None: all of the run. Collective over the run, as `build_groups`."""
    mesh, axes = groups.mesh, (*ZERO, "tensor")
    if mesh.pipeline == 1:
        return None
    if mesh.tensor == 1 or mesh.size(*ZERO) == 1:
        return groups.zero_group if mesh.tensor == 1 else groups.tensor.group
    made = {tuple(ranks): dist.new_group(ranks) for ranks in mesh.groups(*axes)}
    return next(group for ranks, group in made.items() if groups.rank in ranks)


def build_groups(mesh: Mesh, *, sequence_parallel: bool = False, timeout_s: float = 1800.0) -> Groups:
    """Makes every group; collective: all ranks call it in the same order.

    Args:
        timeout_s: after this many seconds a collective that does not finish ends the process.

    Raises:
        ValueError: the run has another number of processes than the mesh.
    """
    if mesh.size() != dist.get_world_size():
        raise ValueError(f"{dist.get_world_size()} processes do not fill {mesh}, which has {mesh.size()} ranks")
    rank, timeout = dist.get_rank(), timedelta(seconds=timeout_s)
    tensor_group = _group_along(mesh, rank, timeout, "tensor")
    tensor = TensorParallel(
        mesh.tensor, mesh.index(rank, "tensor"), tensor_group, sequence_parallel and mesh.tensor > 1
    )
    zero_group = _group_along(mesh, rank, timeout, *ZERO)
    return Groups(mesh, rank, tensor, zero_group, _place_in_rows(mesh, rank, timeout))


def with_context(groups: Groups, context: int, *, timeout_s: float = 1800.0) -> Groups:
    """The same ranks and groups where rows are shared out over so many ranks; collective.

    Nothing but samples and rows changes hands: the ranks that share ZeRO's state stay the same, in the same order.

    Raises:
        ValueError: that many ranks do not divide those that hold the same parameters.
    """
    if context == groups.mesh.context:
        return groups
    data, left = divmod(groups.zero_size, context)
    if left:
        raise ValueError(f"{groups.zero_size} ranks with the same parameters cannot share rows out over {context}")
    mesh = replace(groups.mesh, data=data, context=context)
    return replace(groups, mesh=mesh, context=_place_in_rows(mesh, groups.rank, timedelta(seconds=timeout_s)))


def _place_in_rows(mesh: Mesh, rank: int, timeout: timedelta) -> ContextParallel | None:
    if mesh.context == 1:
        return None
    return ContextParallel(mesh.context, mesh.index(rank, "context"), _group_along(mesh, rank, timeout, "context"))


def _group_along(mesh: Mesh, rank: int, timeout: timedelta, *axes: str) -> Any:
    """This rank's; every rank takes part in making all of them."""
    made = {tuple(ranks): dist.new_group(ranks, timeout=timeout) for ranks in mesh.groups(*axes)}
    return next(group for ranks, group in made.items() if rank in ranks)
