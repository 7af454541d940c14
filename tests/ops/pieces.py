"""Ranks that hold the pieces of a row, played one after the other in one process."""

from collections.abc import Callable

import torch
from torch import Tensor


class Chain:
    """The place of every piece, for calls of the fused mixer in their order; the backward pass comes the other way
    round by itself, since autograd begins with what was computed last."""

    def __init__(self) -> None:
        self.tail: Tensor | None = None  # of the piece before, forward; its gradient from the piece after, backward
        self.state: Tensor | None = None
        self.grad_tail: Tensor | None = None
        self.grad_state: Tensor | None = None

    def start_before(self, reach: int, x: Tensor) -> Callable[[], list[Tensor]]:
        before = torch.zeros_like(x[:, :reach]) if self.tail is None else self.tail
        self.tail = x[:, -reach:].clone()
        return lambda: [before]

    def start_before_gradients(self, length: int, grad: Tensor) -> Callable[[list[Tensor]], None]:
        found, self.grad_tail = self.grad_tail, grad.clone()

        def add(totals: list[Tensor]) -> None:
            if found is not None:
                totals[0][:, length - found.shape[1] :] += found

        return add

    def scan_states(self, final: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
        before = torch.zeros_like(final) if self.state is None else self.state
        self.state = final + carried[..., None, None] * before
        return before, carried

    def scan_state_gradients(self, grad: Tensor, carried: Tensor) -> Tensor:
        leaving = torch.zeros_like(grad) if self.grad_state is None else self.grad_state
        self.grad_state = grad + carried[..., None, None] * leaving
        return leaving


def known_before(seq_idx: Tensor | None, rows: int, first: int, reach: int, device) -> Tensor:
    """[rows, reach] which of the tokens before `first` are there and of its document."""
    at = torch.arange(first - reach, first, device=device)
    known = (at >= 0).expand(rows, reach)
    return known if seq_idx is None else known & (seq_idx[:, at.clamp(min=0)] == seq_idx[:, first, None])


def mix_in_pieces(inputs: tuple[Tensor, ...], sizes: dict, ends: list[int], **options) -> Tensor:
    """`mamba2_mix` of every piece side by side.

    Args:
        inputs: as for `mamba2_mix`, of whole rows.
        sizes: seq_idx, headdim, groups, d_state.
        ends: where each piece ends; they need not be of one length.
    """
    from megatron_taipan.ops.mamba2_triton import mamba2_mix

    zxbcdt, conv_weight, *others = inputs
    chain, parts, seq_idx = Chain(), [], sizes["seq_idx"]
    for first, end in zip([0, *ends[:-1]], ends, strict=True):
        own = sizes | {"seq_idx": None if seq_idx is None else seq_idx[:, first:end]}
        known = known_before(seq_idx, len(zxbcdt), first, conv_weight.shape[1] - 1, zxbcdt.device)
        parts.append(mamba2_mix(zxbcdt[:, first:end], conv_weight, *others, **own, **options, place=chain, known=known))
    return torch.cat(parts, 1)
