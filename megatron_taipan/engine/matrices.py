"""Whole matrices from their shards, each on one rank that orthogonalises it for all, and the results back.

ZeRO lays a rank's parameters end to end and cuts that once per data rank, tensor parallelism cuts each matrix by rows
or columns: what one rank updates of a matrix is a run of elements of a shard. Orthogonal is a matrix only as a whole.
So each has an owner among the ranks that hold parts of it. Everyone sends its runs to the owners in one all-to-all and
gets them back in another: every element travels twice, in the type of the iteration, and all ranks share the work.
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taipan.engine.newton_schulz import orthogonalise, update_scale, work
from megatron_taipan.engine.state_shards import StateShard
from megatron_taipan.ops.copies import copy_all
from megatron_taipan.optim_config import OptimConfig
from megatron_taipan.parallel.all_ranks import gather_objects, world_size
from megatron_taipan.param_spec import ParamSpec
from megatron_taipan.parameters import merge_shards, take_shard


class Run(NamedTuple):
    """Elements that a rank holds of a tensor rank's flattened shard of a matrix."""

    name: str
    tensor_rank: int
    start: int
    length: int


class MatrixExchange:
    """The matrices of one parameter group; made and used by all ranks that hold parts of them together.

    Of matrices that every tensor rank holds, tensor rank 0 sends its copy, and all get the same result.

    Args:
        shards: what this rank updates of the matrices; maybe nothing.
        table: every parameter, for `tensor_size` ranks.
        group: the ranks; None: all of the run.
        dtype: in which updates travel and are orthogonalised.
        device: of the shards.
    """

    def __init__(
        self,
        shards: list[StateShard],
        table: dict[str, ParamSpec],
        optim: OptimConfig,
        *,
        tensor_rank: int,
        tensor_size: int,
        group: Any,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.shards, self.tensor_size, self.group, self.dtype, self.device = shards, tensor_size, group, dtype, device
        self.steps = optim.muon_steps
        self.scales = [update_scale(table[shard.name].shape, optim.muon_scale) for shard in shards]
        held = gather_objects([Run(s.name, tensor_rank, s.start, s.count) for s in shards], group)
        me, ranks = dist.get_rank(group) if len(held) > 1 else 0, range(len(held))
        owners = share_out({run.name: work(table[run.name].shape) for runs in held for run in runs}, len(held))
        self.owned = {name: table[name] for name, owner in owners.items() if owner == me}

        def is_sent(run: Run) -> bool:
            return table[run.name].split is not None or run.tensor_rank == 0

        # by rank: which shards it is sent, which runs it sends, which it gets back, which shards come back from it
        self.send = [[i for i, run in enumerate(held[me]) if owners[run.name] == r and is_sent(run)] for r in ranks]
        self.get = [[run for run in held[r] if run.name in self.owned and is_sent(run)] for r in ranks]
        self.give = [[run for run in held[r] if run.name in self.owned] for r in ranks]
        self.take = [[i for i, run in enumerate(held[me]) if owners[run.name] == r] for r in ranks]

    def orthogonalise(self, updates: dict[Tensor, Tensor]) -> None:
        """Replaces the updates of matrices by scaled orthogonal ones, in place; collective.

        Args:
            updates: for each tensor that the optimizer steps, a contiguous one of its size. What belongs to no shard,
                padding, stays.
        """
        views = [updates[s.flat].view(-1)[s.offset : s.offset + s.count] for s in self.shards]
        low = [view.to(self.dtype) for view in views]
        came = self._trade(
            [[low[i] for i in send] for send in self.send], [[r.length for r in get] for get in self.get]
        )
        made = self._made_of([run for get in self.get for run in get], [values for some in came for values in some])
        back = self._trade(
            [[made[r.name][r.tensor_rank][r.start : r.start + r.length] for r in give] for give in self.give],
            [[views[i].numel() for i in take] for take in self.take],
        )
        copy_all([views[i] for take in self.take for i in take], [values for some in back for values in some])
        if views:
            torch._foreach_mul_(views, self.scales)

    def _made_of(self, runs: list[Run], values: list[Tensor]) -> dict[str, list[Tensor]]:
        """The orthogonalised matrices that this rank owns, of each the flattened shards of all tensor ranks."""
        size = self.tensor_size
        shards = {
            name: [
                torch.empty(spec.local_shape(size), dtype=self.dtype, device=self.device)
                for _ in range(1 if spec.split is None else size)
            ]
            for name, spec in self.owned.items()
        }
        copy_all([shards[r.name][r.tensor_rank].view(-1)[r.start : r.start + r.length] for r in runs], values)
        made = orthogonalise([merge_shards(shards[name], spec) for name, spec in self.owned.items()], self.steps)
        return {
            name: [take_shard(matrix, spec, size, rank).flatten() for rank in range(size)]
            for (name, spec), matrix in zip(self.owned.items(), made, strict=True)
        }

    def _trade(self, outgoing: list[list[Tensor]], lengths: list[list[int]]) -> list[list[Tensor]]:
        """Flat tensors for every rank, against those that every rank has for this one, which have these lengths."""
        if world_size(self.group) == 1:
            return outgoing
        flat = [torch.cat([self._nothing(), *tensors]) for tensors in outgoing]
        counts = [sum(some) for some in lengths]
        received = torch.empty(sum(counts), dtype=self.dtype, device=self.device)
        dist.all_to_all_single(received, torch.cat(flat), counts, [len(part) for part in flat], group=self.group)
        return [list(part.split(some)) for part, some in zip(received.split(counts), lengths, strict=True)]

    def _nothing(self) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device=self.device)


def share_out(works: dict[str, int], ranks: int) -> dict[str, int]:
    """An owner for each matrix, so that ranks have about the same work: the largest first, to who has least."""
    loads, owners = [0] * ranks, {}
    for name in sorted(works, key=lambda name: (-works[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += works[name]
    return owners
