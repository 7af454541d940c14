"""What every layer is built with, and how it makes its parameters."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from megatron_taipan.model.init import initial_value
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.ops.operations import Ops
from megatron_taipan.parallel.one_rank import OneRank
from megatron_taipan.param_spec import ParamSpec
from megatron_taipan.parameters import take_shard

if TYPE_CHECKING:
    from megatron_taipan.parallel.context import ContextParallel


@dataclass(frozen=True)
class Build:
    """Everything that a layer needs to know to build itself."""

    config: ModelConfig
    table: dict[str, ParamSpec]
    seed: int
    tp: OneRank
    ops: Ops
    place: "ContextParallel | None" = None  # which piece of its rows this rank holds; None: whole rows

    def parameters(self, module: nn.Module, prefix: str) -> None:
        """Registers on `module` every parameter of the table directly under `prefix`, with its value.

        Each carries its full name, its row of the table as `spec`, and `tensor_model_parallel` where it is split
        (what DeepSpeed asks when it adds up the gradient norm).
        """
        for name, spec in self.table.items():
            head, _, last = name.rpartition(".")
            if head == prefix:
                parameter = nn.Parameter(self._value(name, spec))
                parameter.full_name, parameter.spec = name, spec
                if spec.split is not None and self.tp.size > 1:
                    parameter.tensor_model_parallel = True
                module.register_parameter(last, parameter)
                if spec.float32:
                    setattr(module, "fp32_params", (*getattr(module, "fp32_params", ()), last))  # noqa: B010

    def _value(self, name: str, spec: ParamSpec) -> Tensor:
        """This rank's shard of the initial value; only its shape where the default device is meta."""
        device = torch.get_default_device()
        if device.type == "meta":
            return torch.empty(spec.local_shape(self.tp.size))
        full = initial_value(name, spec, self.config, self.seed)
        return take_shard(full, spec, self.tp.size, self.tp.rank).to(device)


class KeepsFp32Params(nn.Module):
    """A module some of whose own parameters and buffers stay float32 when it is cast to bf16 or fp16.

    The table says which parameters those are; buffers of such a module always do. Any other move or cast
    (device, float64) applies to them too. Names are stored, not parameters: loaders may replace parameters by new ones.
    """

    fp32_params: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "KeepsFp32Params":
        fp32_params = {name: self.get_parameter(name).data for name in self.fp32_params}
        buffers = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, before in fp32_params.items():
            parameter = self.get_parameter(name)
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = before.to(parameter.device)
        for name, before in buffers.items():
            buffer = self.get_buffer(name)
            if buffer.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, before.to(buffer.device))
        return self
