"""Context parallelism: ranks that hold consecutive pieces of the same rows, and what layers ask of each other there.

Rank r of n holds tokens r l to (r + 1) l - 1 of rows of n l tokens. A layer needs little of what is before its piece:

    M   the state that enters the piece (`EnteringState`) and the last inputs of the convolution (`Before`)
    S W keys and values of one window (`Joined`)
    A   all earlier keys and values (`Joined`, as long as they are)
    the gate's budget: how many tokens the other pieces selected (`SumPieces`)

The run's loss is the sum of what all pieces contribute, so every operation here is the exact adjoint of itself: a
gradient that another piece causes comes back to the tokens that it saw. ZeRO averages parameters' gradients over data
and context ranks together, and train/step.py scales the loss by their number.

The autograd functions are made of plain calls, which the fused mixer (ops/mamba2_piece.py) makes itself. A call
`start_...` sends, and returns a function that waits for what comes: work between the two hides the way.
"""

from collections.abc import Callable
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
        return Before.apply(x, self, reach)

    def join_earlier(self, reach: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The `reach` tokens before this piece in front of each tensor: [b, l, ...] -> [b, reach + l, ...]; zeros where
        the row has not begun."""
        return Joined.apply(self, reach, *tensors)

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

    def scan(
        self, ssd: Callable[..., Any], x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, goes_on: Tensor,
        **options: Any,
    ) -> Tensor:  # fmt: skip
        """The state space scan (ops/ssd.py) of rows of which these tokens are a piece.

        The piece is scanned from an empty state; what its first document's tokens read from the state that entered is
        added when that is known.

        Args:
            x, dt, A, B, C, options: what `ssd` takes, of this piece.
            goes_on: [b, l] bool, tokens of the document that began before this piece.

        Returns:
            y [b, l, h, p].
        """
        y, final = ssd(x, dt, A, B, C, return_state=True, **options)
        decay = (dt * A).cumsum(1).masked_fill(~goes_on[..., None], float("-inf")).exp()  # [b, l, h] since its start
        entered = self.entering_state(final, decay[:, -1])
        return y + entered_output(C, entered, decay).to(y.dtype)

    def sum_pieces(self, x: Tensor) -> Tensor:
        """The sum over the pieces, known to all of them."""
        return SumPieces.apply(x, self)

    # --- outside of autograd ---

    def start_before(self, reach: int, *tensors: Tensor) -> Callable[[], list[Tensor]]:
        """Asks for what `before` gives, of several tensors [b, l, ...] of one dtype."""
        length = tensors[0].shape[1]
        to = [self.overlap(self.rank, q, length, reach) for q in range(self.size)]
        of = [self.overlap(q, self.rank, length, reach) for q in range(self.size)]
        sent = [[x[:, length - n :] for x in tensors] for n in to]
        finish = self.start_exchange(sent, [[(len(x), n, *x.shape[2:]) for x in tensors] for n in of])
        blank = reach - sum(of)

        def wait() -> list[Tensor]:
            found = zip(*finish(), strict=True)  # by tensor, the owners in order
            return [
                torch.cat([x.new_zeros(len(x), blank, *x.shape[2:]), *parts], 1)
                for x, parts in zip(tensors, found, strict=True)
            ]

        return wait

    def start_before_gradients(self, length: int, *grads: Tensor) -> Callable[[list[Tensor]], None]:
        """The adjoint of `start_before`, of gradients [b, reach, ...].

        Returns:
            A function that adds to this piece's own gradients [b, length, ...], in place, what the pieces after it have
            found.
        """
        reach = grads[0].shape[1]
        to = [self.overlap(q, self.rank, length, reach) for q in range(self.size)]
        of = [self.overlap(self.rank, q, length, reach) for q in range(self.size)]
        parts = [grad.split([reach - sum(to), *to], 1)[1:] for grad in grads]
        sent = [list(of_rank) for of_rank in zip(*parts, strict=True)]
        finish = self.start_exchange(sent, [[(len(g), n, *g.shape[2:]) for g in grads] for n in of])

        def add(totals: list[Tensor]) -> None:
            for n, found in zip(of, finish(), strict=True):
                for total, part in zip(totals, found, strict=True):
                    if n:
                        total[:, length - n :] += part

        return add

    def scan_states(self, final: Tensor, carried: Tensor) -> tuple[Tensor, Tensor]:
        """What `entering_state` gives; and carried of the later pieces [later, b, h], for `scan_state_gradients`."""
        b, h, p, n = final.shape
        own = torch.cat([final.flatten(2), carried[..., None].to(final.dtype)], -1)  # [b, h, p n + 1]
        everyone = self.gather(own)
        states, shares = everyone[..., :-1].unflatten(-1, (p, n)), everyone[..., -1]
        state = torch.zeros_like(final)
        for rank in range(self.rank):
            state = states[rank] + shares[rank, ..., None, None] * state
        return state, shares[self.rank + 1 :].clone()

    def scan_state_gradients(self, grad: Tensor, later: Tensor) -> Tensor:
        """From the gradient of the state that enters each piece, as far as its own tokens read it, to that of the state
        that leaves this one.

        Args:
            grad: [b, h, p, n] of this piece; later: as from `scan_states`.
        """
        entering = self.gather(grad)
        leaving = torch.zeros_like(grad)
        for rank in range(self.size - 1, self.rank, -1):
            leaving = entering[rank] + later[rank - self.rank - 1, ..., None, None] * leaving
        return leaving

    # --- collectives ---

    def gather(self, x: Tensor) -> Tensor:
        """x of every rank: [...] -> [size, ...]. Counted is what this rank sends, its own x."""
        everyone = x.new_empty(self.size, *x.shape)
        self.counter.add("all_gather", x.numel() * x.element_size())
        dist.all_gather_into_tensor(everyone, x.contiguous()[None], group=self.group)
        return everyone

    def start_exchange(
        self, sent: list[list[Tensor]], received: list[list[tuple[int, ...]]]
    ) -> Callable[[], list[list[Tensor]]]:
        """Tensors to each rank, and tensors of these shapes from each, all of one dtype; any of them may be empty."""
        flat = torch.cat([t.reshape(-1) for part in sent for t in part])
        sizes = [sum(map(prod, shapes)) for shapes in received]
        found = flat.new_empty(sum(sizes))
        self.counter.add("all_to_all", flat.numel() * flat.element_size())
        counts = [sum(t.numel() for t in part) for part in sent]
        work = dist.all_to_all_single(found, flat, sizes, counts, group=self.group, async_op=True)

        def wait() -> list[list[Tensor]]:
            work.wait()
            return [
                [t.view(shape) for t, shape in zip(part.split([prod(s) for s in shapes]), shapes, strict=True)]
                for part, shapes in zip(found.split(sizes), received, strict=True)
            ]

        return wait

    def overlap(self, owner: int, reader: int, length: int, reach: int) -> int:
        """How many tokens of the owner's piece, its last ones, are among the `reach` before the reader's."""
        if owner >= reader:
            return 0
        return max(0, min(length, reach - (reader - owner - 1) * length))


def entered_output(C: Tensor, entered: Tensor, decay: Tensor) -> Tensor:
    """What tokens read from a state that entered before the first of them.

    Args:
        C: [b, l, g, n]; entered: [b, h, p, n]; decay: [b, l, h], of the state until each token, 0 where it is not read.

    Returns:
        [b, l, h, p] in the dtype of the state.
    """
    b, h, p, n = entered.shape
    state = entered.view(b, C.shape[2], -1, p, n)  # heads as [group, head in group]
    read = torch.einsum("blgn,bgkpn->blgkp", C.to(entered.dtype), state).flatten(2, 3)
    return read * decay[..., None]


class Before(torch.autograd.Function):
    """See `ContextParallel.before`. The gradient of every copy comes back to the piece that owns the token."""

    @staticmethod
    def forward(ctx, x, place, reach):
        ctx.place, ctx.shape = place, x.shape
        return place.start_before(reach, x)()[0]

    @staticmethod
    def backward(ctx, grad):
        add = ctx.place.start_before_gradients(ctx.shape[1], grad)
        total = grad.new_zeros(ctx.shape)
        add([total])
        return total, None, None


class Joined(torch.autograd.Function):
    """See `ContextParallel.join_earlier`. Own tokens are copied to their place while the others are on their way."""

    @staticmethod
    def forward(ctx, place, reach, *tensors):
        ctx.place, ctx.reach, ctx.length = place, reach, tensors[0].shape[1]
        wait = place.start_before(reach, *tensors)
        joined = tuple(x.new_empty(len(x), reach + ctx.length, *x.shape[2:]) for x in tensors)
        for whole, x in zip(joined, tensors, strict=True):
            whole[:, reach:] = x
        for whole, earlier in zip(joined, wait(), strict=True):
            whole[:, :reach] = earlier
        return joined

    @staticmethod
    def backward(ctx, *grads):
        add = ctx.place.start_before_gradients(ctx.length, *(grad[:, : ctx.reach] for grad in grads))
        totals = [grad[:, ctx.reach :].clone(memory_format=torch.contiguous_format) for grad in grads]
        add(totals)
        return None, None, *totals


class EnteringState(torch.autograd.Function):
    """See `ContextParallel.entering_state`: an exclusive scan over the ranks, each of which sends its own part once.

    With D_r the gradient of what enters piece r, that of what leaves it is G_r = D_{r+1} + carried_{r+1} G_{r+1};
    final_r has G_r, and carried_r <G_r, S_{r-1}>.
    """

    @staticmethod
    def forward(ctx, final, carried, place):
        state, later = place.scan_states(final, carried)
        ctx.place, ctx.carried_dtype = place, carried.dtype
        ctx.save_for_backward(state, later)
        return state

    @staticmethod
    def backward(ctx, grad):
        state, later = ctx.saved_tensors
        leaving = ctx.place.scan_state_gradients(grad, later)
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
