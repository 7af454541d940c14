"""Numbers sent between host and device without either waiting for the other."""

from collections.abc import Sequence

import torch
from torch import Tensor


class Readback:
    """Numbers on their way to the host: the copy is queued when this is made, after what was launched before.

    `read` waits for that copy only. What is launched in between keeps running, so the host returns in time to launch
    more.

    Args:
        values: of any shape, on any device; what is written there later is not read.
    """

    def __init__(self, values: Tensor):
        # only copies to pinned memory run beside the host
        self.values = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=values.is_cuda)
        self.values.copy_(values.detach(), non_blocking=True)
        self.arrived = torch.cuda.current_stream(values.device).record_event() if values.is_cuda else None

    def read(self) -> Tensor:
        """The values, on the CPU."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.values


def send(values: Sequence[float], device: torch.device) -> Tensor:
    """[n] float64 on the device; torch.tensor(values, device=device) would wait for all that runs there."""
    pinned = device.type == "cuda" and len(values) > 0
    return torch.tensor(values, dtype=torch.float64, pin_memory=pinned).to(device, non_blocking=True)
