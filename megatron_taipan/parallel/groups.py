"""Process groups: which ranks share a tensor, a batch or a pipeline.

Ranks are numbered with the tensor index fastest, then data, then pipeline, as in Megatron-LM and in DeepSpeed's
PipeModelDataParallelTopology, so that a tensor group lies within one host.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_taipan.errors import UserError
from megatron_taipan.parallel.tensor import TensorParallel


@dataclass(frozen=True)
class Groups:
    """This rank's place in every group."""

    tensor: TensorParallel
    data_size: int
    data_rank: int
    data_group: Any
    pipeline_size: int
    pipeline_rank: int
    mpu: "ModelParallelUnit"


class ModelParallelUnit:
    """The questions that DeepSpeed asks of a model-parallel layout (its `mpu` argument)."""

    def __init__(self, tensor: TensorParallel, data_group: Any, data_size: int, data_rank: int, tensor_first: int):
        self.tensor, self.tensor_first = tensor, tensor_first
        self.data_group, self.data_size, self.data_rank = data_group, data_size, data_rank

    def get_model_parallel_group(self) -> Any:
        return self.tensor.group

    def get_model_parallel_rank(self) -> int:
        return self.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self.tensor.size

    def get_model_parallel_src_rank(self) -> int:
        return self.tensor_first

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_src_rank = get_model_parallel_src_rank

    def get_data_parallel_group(self) -> Any:
        return self.data_group

    def get_data_parallel_rank(self) -> int:
        return self.data_rank

    def get_data_parallel_world_size(self) -> int:
        return self.data_size


def data_parallel_size(world_size: int, tensor: int, pipeline: int) -> int:
    """What is left of the world for data parallelism.

    Raises:
        UserError: there is no process, or tensor * pipeline does not divide their number.
    """
    if world_size < 1:
        raise UserError(f"{world_size} processes cannot train; give at least 1")
    if world_size % (tensor * pipeline):
        raise UserError(
            f"{world_size} processes cannot hold parallel.tensor={tensor} x parallel.pipeline={pipeline}"
            f" = {tensor * pipeline} (remainder {world_size % (tensor * pipeline)}); start a multiple of"
            f" {tensor * pipeline} processes or change the layout"
        )
    return world_size // (tensor * pipeline)


def set_timeouts(timeout_s: float) -> None:
    """Gives every process group of this process the timeout, also those that DeepSpeed made with its own."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def build_groups(
    *,
    world_size: int,
    rank: int,
    tensor: int = 1,
    pipeline: int = 1,
    sequence_parallel: bool = False,
    timeout_s: float = 1800.0,
) -> Groups:
    """Makes every group; collective: all ranks call it in the same order.

    Args:
        timeout_s: after this many seconds a collective that does not finish ends the process.

    Raises:
        UserError: the sizes do not fit the number of processes.
    """
    data = data_parallel_size(world_size, tensor, pipeline)
    timeout = timedelta(seconds=timeout_s)
    tensor_index, data_index, pipe_index = rank % tensor, rank // tensor % data, rank // (tensor * data)

    def new_group(ranks: list[int]) -> Any:
        return dist.new_group(ranks, timeout=timeout)

    tensor_group = data_group = None
    for first in range(0, world_size, tensor):
        group = new_group(list(range(first, first + tensor)))
        if first <= rank < first + tensor:
            tensor_group = group
    for stage in range(pipeline):
        for index in range(tensor):
            ranks = [stage * data * tensor + d * tensor + index for d in range(data)]
            group = new_group(ranks)
            if rank in ranks:
                data_group = group
    place = TensorParallel(tensor, tensor_index, tensor_group, sequence_parallel and tensor > 1)
    mpu = ModelParallelUnit(place, data_group, data, data_index, rank - tensor_index)
    return Groups(place, data, data_index, data_group, pipeline, pipe_index, mpu)
