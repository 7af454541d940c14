"""What the fused mixer exchanges where other ranks hold its rows' other pieces.

The last inputs of the convolution in the piece before are on their way while a kernel runs that does not need them,
the state that enters is found between two passes of the scan, and the gradients go the same way back. Nothing asks the
host, so CUDA graphs can hold it.

    forward    ask for the tail | convolution without it | the first tokens again, with it
               first pass of the scan | scan over the ranks | second pass, from the right state
    backward   first pass of the reverse scan | scan back over the ranks | the other kernels
               gradient of the tail | send it | convolution's gradients | add what came to the last tokens'
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_taipan.ops.causal_conv1d_triton import conv_backward, conv_forward, conv_tail_gradient


class Place(Protocol):
    """One rank among those that hold the pieces; its calls are those of `parallel.context.ContextParallel`."""

    def start_before(self, reach: int, *tensors: Tensor) -> Callable[[], list[Tensor]]: ...

    def start_before_gradients(self, length: int, *grads: Tensor) -> Callable[[list[Tensor]], None]: ...

    def scan_states(self, final: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]: ...

    def scan_state_gradients(self, grad: Tensor, later: Tensor) -> Tensor: ...


@dataclass
class Piece:
    """A piece of each row in one forward or backward pass; what the forward pass leaves for the backward pass."""

    place: Place
    known: Tensor  # [b, width - 1] bool: which of the tokens before the piece are of its first token's document
    tail: Tensor | None = None  # [b, width - 1, c], those tokens' inputs of the convolution, zeros for the others
    later: Tensor | None = None  # see `ContextParallel.scan_states`

    @property
    def goes_on(self) -> Tensor:
        """[b] whether the first token's document began before the piece."""
        return self.known[:, -1]

    def conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
        """As `conv_forward`, with the tokens before the piece."""
        reach = self.known.shape[1]
        wait = self.place.start_before(reach, x)
        y = conv_forward(x, weight, bias, seq_idx, None)
        self.tail = torch.where(self.known[..., None], wait()[0], 0).contiguous()
        self._correct(y, x, weight, bias, seq_idx)
        return y

    def conv_again(self, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> Tensor:
        """What `conv_forward` gave, from the tail that it left; nothing is sent."""
        y = conv_forward(x, weight, bias, seq_idx, None)
        self._correct(y, x, weight, bias, seq_idx)
        return y

    def _correct(self, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None) -> None:
        """The first tokens of y once more, with the tail."""
        reach = self.known.shape[1]
        seq_idx = seq_idx[:, :reach].contiguous() if seq_idx is not None else None
        y[:, :reach] = conv_forward(x[:, :reach], weight, bias, seq_idx, self.tail)

    def conv_backward(
        self, dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, dx: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As `conv_backward`; dx has also what the pieces after this one found of its last tokens."""
        assert self.tail is not None  # by the forward pass
        dtail = conv_tail_gradient(dy, x, weight, bias, seq_idx, self.tail)
        add = self.place.start_before_gradients(x.shape[1], torch.where(self.known[..., None], dtail, 0))
        sums = conv_backward(dy, x, weight, bias, seq_idx, self.tail, dx)
        add([dx])
        return sums

    def enter(self, final: Tensor, carried: Tensor) -> Tensor:
        """For `scan_forward`: the state that enters the piece, zeros where the piece begins a document."""
        goes_on = self.goes_on
        state, self.later = self.place.scan_states(final, torch.where(goes_on[:, None], carried, 0))
        return torch.where(goes_on[:, None, None, None], state, 0)

    def leave(self, grad: Tensor) -> Tensor:
        """For `scan_backward`: the gradient of the state that leaves the piece."""
        assert self.later is not None  # by the forward pass
        read = torch.where(self.goes_on[:, None, None, None], grad, 0)
        return self.place.scan_state_gradients(read, self.later)
