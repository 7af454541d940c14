"""What ranks with pieces of the same rows ask of each other: values and gradients of one process that holds all rows.

The run's loss is the sum of what the pieces contribute; here each contributes another nonlinear function of what it
was told.
"""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taipan.parallel.context import ContextParallel
from tests.distributed.launch import launch

LENGTH = 5  # of a piece
REACHES = [0, 1, 3, 5, 7, 10, 15]  # up to three whole pieces


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def contribution(told: Tensor, rank: int) -> Tensor:
    return (told.sin() * torch.arange(1 + rank, told.numel() + 1 + rank).view_as(told)).sum()


def states(pieces: int) -> tuple[Tensor, Tensor]:
    """final [pieces, b, h, p, n], carried [pieces, b, h]: documents that start, and a state that does not decay."""
    carried = drawn(pieces, 2, 3).sigmoid()
    carried[pieces // 2, 0, 1], carried[0, 1, 2], carried[pieces - 1, 1, 0] = 0, 0, 1
    return drawn(pieces, 2, 3, 4, 2), carried


def of_this_piece() -> dict[str, tuple]:
    """By question: what this rank was told, and the gradients of what it gave."""
    size, rank = dist.get_world_size(), dist.get_rank()
    place = ContextParallel(size, rank, None)
    found = {}

    def ask(name: str, answer, *given: Tensor) -> None:
        given = [t.clone().requires_grad_() for t in given]
        told = answer(*given)
        found[name] = (told.detach(), *torch.autograd.grad(contribution(told, rank), given))

    tokens = drawn(2, size * LENGTH, 3, 2)[:, rank * LENGTH :][:, :LENGTH]
    for reach in REACHES:
        ask(f"before {reach}", lambda x, reach=reach: place.before(x, min(reach, (size - 1) * LENGTH)), tokens)
    final, carried = states(size)
    ask("entering", place.entering_state, final[rank], carried[rank])
    ask("sum", place.sum_pieces, drawn(size, 4)[rank])
    return found


def of_one_process(size: int) -> dict[str, tuple]:
    """The same, [pieces, ...] in one graph."""
    found = {}

    def ask(name: str, answer, *given: Tensor) -> None:
        given = [t.clone().requires_grad_() for t in given]
        told = answer(*given)
        loss = sum(contribution(t, rank) for rank, t in enumerate(told))
        found[name] = (torch.stack(told).detach(), *torch.autograd.grad(loss, given))

    def before(x: Tensor, reach: int) -> list[Tensor]:
        padded = torch.cat([x.new_zeros(2, reach, 3, 2), x], 1)
        return [padded[:, rank * LENGTH :][:, :reach] for rank in range(size)]

    def entering(final: Tensor, carried: Tensor) -> list[Tensor]:
        state = [torch.zeros_like(final[0])]
        for piece in range(size - 1):
            state.append(final[piece] + carried[piece][..., None, None] * state[-1])
        return state

    for reach in REACHES:
        ask(
            f"before {reach}",
            lambda x, reach=reach: before(x, min(reach, (size - 1) * LENGTH)),
            drawn(2, size * LENGTH, 3, 2),
        )
    ask("entering", entering, *states(size))
    ask("sum", lambda x: [x.sum(0)] * size, drawn(size, 4))
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_answers_and_their_gradients_are_those_of_one_process(size):
    pieces = launch(size, of_this_piece)
    for name, (told, *gradients) in of_one_process(size).items():
        ours, *our_gradients = zip(*(piece[name] for piece in pieces), strict=True)
        torch.testing.assert_close(torch.stack(ours), told, rtol=0, atol=1e-12, msg=name)
        for mine, theirs in zip(our_gradients, gradients, strict=True):
            joined = torch.cat(mine, 1) if name.startswith("before") else torch.stack(mine)
            torch.testing.assert_close(joined, theirs, rtol=0, atol=1e-12, msg=f"gradient of {name}")


def test_reach_is_the_window_or_all_that_is_before():
    place = ContextParallel(4, 1, None)
    assert [place.reach(LENGTH, window) for window in (1, 4, 6, 16, 99, None)] == [0, 3, 5, 15, 15, 15]
    # of the 7 tokens before each piece, the one before holds 5 and the one before that 2
    assert [[place.overlap(owner, reader, LENGTH, 7) for reader in range(4)] for owner in range(4)] == [
        [0, 5, 2, 0], [0, 0, 5, 2], [0, 0, 0, 5], [0, 0, 0, 0],
    ]  # fmt: skip
