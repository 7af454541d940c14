"""Every kernel on CPU tensors, in Triton's interpreter (the environment says TRITON_INTERPRET=1)."""

from unittest import mock

import torch

from megatron_taipan.model import attention, gate, layers, mamba2
from megatron_taipan.ops import dispatch


def interpreted_ops() -> dispatch.Ops:
    """The fast operations, also those that no default takes yet; from now on they take this process's CPU tensors,
    float64 ones excepted."""

    def takes_kernels(x: torch.Tensor) -> bool:
        return x.dtype != torch.float64

    for module in (dispatch, attention, gate, layers, mamba2):
        module.takes_kernels = takes_kernels
    with mock.patch("torch.cuda.is_available", lambda: True):
        return dispatch.pick_ops("fast", {"rope": "triton", "selection": "triton", "gate": "triton"})
