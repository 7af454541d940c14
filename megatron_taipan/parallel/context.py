"""Context parallelism: ranks that hold consecutive pieces of the same rows, and what layers ask of each other there.

Rank r of n holds tokens r l to (r + 1) l - 1 of rows of n l tokens. A layer needs little of what is before its piece:

    M   the state that enters the piece (`EnteringState`) and the last inputs of the convolution (`Halo`)
    S W keys and values of one window (`Halo`)
    A   all earlier keys and values (`Halo`, as long as they are)
    the gate's budget: how many tokens the other pieces selected (`SumPieces`)

The run's loss is the sum of what all pieces contribute, so every operation here is the exact adjoint of itself: a
gradient that another piece causes comes back to the tokens that it saw. ZeRO averages parameters' gradients over data
and context ranks together, and train/step.py scales the loss by their number.
"""

from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taipan.parallel.counter import CommCounter


@dataclass(frozen=True)
class ContextParallel:
    """One rank's place in its group."""

    size: int
    rank: int
    group: Any
    counter: CommCounter = field(default_factory=CommCounter)

    def before(self, x: Tensor, reach: int) -> Tensor:
        """The `reach` tokens before this piece, zeros where the row has not begun: x [b, l, ...] -> [b, reach, ...]."""
        return Halo.apply(x, self, reach)

    def reach(self, length: int, window: int | None) -> int:
        """How many tokens before its piece of `length` any token of any rank can see."""
        before = (self.size - 1) * length
        return before if window is None else min(window - 1, before)

    def entering_state(self, final: Tensor, carried: Tensor) -> Tensor:
        """The state that enters this piece, zeros for the first.

        Args:
            final: [b, h, p, n] float32 or float64, what this piece alone leaves at its end, from an empty state.
            carried: [b, h] share of an entering state that is left at its end: its decay, 0 where another document
                began.

        Returns:
            [b, h, p, n]: S_{r-1} of S_r = final_r + carried_r S_{r-1}.
        """
        return EnteringState.apply(final, carried, self)

    def sum_pieces(self, x: Tensor) -> Tensor:
        """The sum over the pieces, known to all of them."""
        return SumPieces.apply(x, self)

    # --- collectives ---

    def gather(self, x: Tensor) -> Tensor:
        """x of every rank: [...] -> [size, ...]. Counted is what this rank sends, its own x."""
        everyone = x.new_empty(self.size, *x.shape)
        self.counter.add("all_gather", x.numel() * x.element_size())
        dist.all_gather_into_tensor(everyone, x.contiguous()[None], group=self.group)
        return everyone

    def exchange(self, sent: list[Tensor], received: list[tuple[int, ...]]) -> list[Tensor]:
        """Tensors to each rank, and tensors of these shapes from each, all of one dtype; any of them may be empty."""
        flat = torch.cat([t.reshape(-1) for t in sent])
        sizes = [prod(shape) for shape in received]
        found = flat.new_empty(sum(sizes))
        self.counter.add("all_to_all", flat.numel() * flat.element_size())
        dist.all_to_all_single(found, flat, sizes, [t.numel() for t in sent], group=self.group)
        return [part.view(shape) for part, shape in zip(found.split(sizes), received, strict=True)]

    def overlap(self, owner: int, reader: int, length: int, reach: int) -> int:
        """How many tokens of the owner's piece, its last ones, are among the `reach` before the reader's."""
        if owner >= reader:
            return 0
        return max(0, min(length, reach - (reader - owner - 1) * length))


class Halo(torch.autograd.Function):
    """See `ContextParallel.before`. The gradient of every copy comes back to the piece that owns the token."""

    @staticmethod
    def forward(ctx, x, place, reach):
        ctx.place, ctx.reach, ctx.shape = place, reach, x.shape
        b, length, *rest = x.shape
        to = [place.overlap(place.rank, q, length, reach) for q in range(place.size)]
        of = [place.overlap(q, place.rank, length, reach) for q in range(place.size)]
        found = place.exchange([x[:, length - n :] for n in to], [(b, n, *rest) for n in of])
        return torch.cat([x.new_zeros(b, reach - sum(of), *rest), *found], 1)

    @staticmethod
    def backward(ctx, grad):
        place, (b, length, *rest) = ctx.place, ctx.shape
        to = [place.overlap(q, place.rank, length, ctx.reach) for q in range(place.size)]
        of = [place.overlap(place.rank, q, length, ctx.reach) for q in range(place.size)]
        parts = grad.split([ctx.reach - sum(to), *to], 1)[1:]
        found = place.exchange(list(parts), [(b, n, *rest) for n in of])
        total = grad.new_zeros(ctx.shape)
        for n, part in zip(of, found, strict=True):
            total[:, length - n :] += part
        return total, None, None


class EnteringState(torch.autograd.Function):
    """See `ContextParallel.entering_state`: an exclusive scan over the ranks, each of which sends its own part once.

    With D_r the gradient of what enters piece r, that of what leaves it is G_r = D_{r+1} + carried_{r+1} G_{r+1};
    final_r has G_r, and carried_r <G_r, S_{r-1}>.
    """

    @staticmethod
    def forward(ctx, final, carried, place):
        b, h, p, n = final.shape
        own = torch.cat([final.flatten(2), carried[..., None].to(final.dtype)], -1)  # [b, h, p n + 1]
        everyone = place.gather(own)
        states, shares = everyone[..., :-1].unflatten(-1, (p, n)), everyone[..., -1, None, None]
        state = torch.zeros_like(final)
        for rank in range(place.rank):
            state = states[rank] + shares[rank] * state
        ctx.place, ctx.carried_dtype = place, carried.dtype
        ctx.save_for_backward(state, shares[place.rank + 1 :].clone())
        return state

    @staticmethod
    def backward(ctx, grad):
        state, shares = ctx.saved_tensors
        place = ctx.place
        entering = place.gather(grad)
        leaving = torch.zeros_like(grad)
        for rank in range(place.size - 1, place.rank, -1):
            leaving = entering[rank] + shares[rank - place.rank - 1] * leaving
        return leaving, (leaving * state).sum((-2, -1)).to(ctx.carried_dtype), None


class SumPieces(torch.autograd.Function):
    """See `ContextParallel.sum_pieces`. Every rank computes on from the sum, so the gradients are summed as well."""

    @staticmethod
    def forward(ctx, x, place):
        ctx.place = place
        return SumPieces.sum(x, place)

    @staticmethod
    def backward(ctx, grad):
        return SumPieces.sum(grad, ctx.place), None

    @staticmethod
    def sum(x: Tensor, place: ContextParallel) -> Tensor:
        total = x.contiguous().clone()
        place.counter.add("all_reduce", total.numel() * total.element_size())
        dist.all_reduce(total, group=place.group)
        return total
