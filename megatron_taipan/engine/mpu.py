"""The mesh under the names that DeepSpeed asks for."""

from typing import Any

from megatron_taipan.parallel.groups import Groups


class ModelParallelUnit:
    """The questions that DeepSpeed asks of a model-parallel layout (its `mpu` argument).

    What it calls data parallel are the ranks that hold the same parameters: it shares ZeRO's state over them and
    averages their gradients. It never asks which samples a rank reads.
    """

    def __init__(self, groups: Groups):
        self.groups = groups

    def get_model_parallel_group(self) -> Any:
        return self.groups.tensor.group

    def get_model_parallel_rank(self) -> int:
        return self.groups.tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self.groups.tensor.size

    def get_model_parallel_src_rank(self) -> int:
        mesh = self.groups.mesh
        return mesh.rank_at(mesh.coordinates(self.groups.rank)._replace(tensor=0))

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_src_rank = get_model_parallel_src_rank

    def get_data_parallel_group(self) -> Any:
        return self.groups.zero_group

    def get_data_parallel_rank(self) -> int:
        return self.groups.zero_rank

    def get_data_parallel_world_size(self) -> int:
        return self.groups.zero_size
