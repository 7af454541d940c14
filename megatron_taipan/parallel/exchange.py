"""Tokens on their way between tensor ranks while products are computed, for sequence parallelism.

A collective sends everything and then the product starts, or the other way round. In pieces, one a rank, both go on at
once: `gather` computes on this rank's own piece while the others' arrive, `scatter` sends what others need before
it computes its own part. How the pieces travel is for others: `Messages` here, for CPUs, and peer_memory.py for GPUs.

Ranks must make the same calls in the same order, as with collectives.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taipan.ops.numerics import wide_dtype


class Transfer(Protocol):
    """One exchange: at most one piece to and from every other rank, all of one shape."""

    def send(self, peer: int, piece: Tensor) -> None:
        """Starts it; the piece must not change before `end`."""

    def receive(self, peer: int) -> Tensor:
        """The piece from there, valid until `end`."""

    def take(self, peer: int) -> Tensor:
        """The only piece that comes, as a new tensor, complete at `end`; in place of `receive`, between two ranks."""

    def place(self, piece: Tensor) -> None:
        """Starts to put this rank's own piece where `whole` needs it; the piece must not change before `whole`."""

    def whole(self) -> Tensor:
        """All pieces, one behind the other in the order of the ranks, once all are placed or received; until `end`."""

    def end(self) -> None:
        """Everything received has been used."""


class OverlappedComm(ABC):
    """Exchanges between the ranks of a tensor group."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self.peers = [(rank + i) % size for i in range(1, size)]

    @abstractmethod
    def start(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Transfer:
        """Begins an exchange of pieces of that shape."""

    def gather(
        self, piece: Tensor, use: Callable[[int, Tensor], object], use_whole: Callable[[Tensor], Any] | None = None
    ) -> Any:
        """use(rank, that rank's piece) for every rank, this one's first, while the others are on their way.

        Args:
            piece: [n/size, ...], of the same shape on every rank.
            use_whole: is given [n, ...], all pieces in the order of the ranks, last; valid until it returns.

        Returns:
            What use_whole returns.
        """
        fetch = Fetch(self, piece, whole=use_whole is not None)
        use(self.rank, piece)
        for peer in self.peers:
            use(peer, fetch.receive(peer))
        result = use_whole(fetch.whole()) if use_whole is not None else None
        fetch.end()
        return result

    def sum(self, x: Tensor) -> Tensor | None:
        """The ranks' sum of a small tensor, in less time than a collective starts; None where that cannot be."""
        return None

    def scatter(
        self,
        make: Callable[[int], Tensor],
        meanwhile: Callable[[], None] | None = None,
        add: Callable[[Tensor], object] | None = None,
    ) -> Tensor:
        """The ranks' sum of make(this rank).

        Args:
            make: this rank's part [n/size, ...] of the sum for that rank; called for the others first.
            meanwhile: work that hides the way.
            add: adds make(this rank) to a tensor in place; with `meanwhile`, and two ranks, called instead of
                make(this rank), so that nothing is left to add up.

        Returns:
            [n/size, ...], a new tensor.
        """
        trip = None
        for peer in self.peers:
            part = make(peer)
            trip = trip or self.start(part.shape, part.dtype, part.device)
            trip.send(peer, part)
        assert trip is not None
        # without other work making this rank's part is what hides the way, so it cannot wait for what comes
        if meanwhile is not None and add is not None and self.size == 2:
            total = trip.take(self.peers[0])
            meanwhile()
            trip.end()
            add(total)
            return total
        mine = make(self.rank)
        if meanwhile is not None:
            meanwhile()
        total = add_up(mine, [trip.receive(peer) for peer in self.peers])
        trip.end()
        return total


class Fetch:
    """The pieces of all ranks on their way to this one, and this one's to them.

    Args:
        whole: whether `whole` will be asked for.
    """

    def __init__(self, exchange: OverlappedComm, piece: Tensor, *, whole: bool = True):
        self.peers, self.received, self.placed = exchange.peers, dict[int, Tensor](), whole
        self.trip = exchange.start(piece.shape, piece.dtype, piece.device)
        for peer in self.peers:
            self.trip.send(peer, piece)
        if whole:
            self.trip.place(piece)

    def receive(self, peer: int) -> Tensor:
        """The piece from there, valid until `end`."""
        if peer not in self.received:  # what comes can be waited for once only
            self.received[peer] = self.trip.receive(peer)
        return self.received[peer]

    def whole(self) -> Tensor:
        """All pieces in the order of the ranks, [ranks x piece, ...], valid until `end`."""
        assert self.placed, "this rank's own piece is not among the others'"
        for peer in self.peers:
            self.receive(peer)
        return self.trip.whole()

    def end(self) -> None:
        """The pieces have been used."""
        self.trip.end()


def add_up(mine: Tensor, others: list[Tensor]) -> Tensor:
    """The sum, rounded once to the parts' type."""
    if len(others) == 1:
        return mine + others[0]
    wide = wide_dtype(mine.dtype)
    total = mine.to(wide) + others[0]  # a new tensor: `mine` may be part of the caller's
    for part in others[1:]:
        total += part
    return total.to(mine.dtype)


class Messages(OverlappedComm):
    """Through the group's own messages: gloo on CPUs."""

    def __init__(self, rank: int, size: int, group: Any):
        super().__init__(rank, size)
        self.group = group

    def start(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Transfer:
        return _MessageTrip(self, shape, dtype, device)


class _MessageTrip:
    def __init__(self, exchange: Messages, shape: Sequence[int], dtype: torch.dtype, device: torch.device):
        self.group, self.rank, self.size = exchange.group, exchange.rank, exchange.size
        self.own: Tensor | None = None
        self.sent: list[Tensor] = []
        self.works: list[Any] = []
        self.arriving = {}
        for peer in exchange.peers:
            piece = torch.empty(*shape, dtype=dtype, device=device)
            self.arriving[peer] = piece, dist.irecv(piece, group=self.group, group_src=peer)

    def send(self, peer: int, piece: Tensor) -> None:
        piece = piece.contiguous()
        self.sent.append(piece)  # alive until it is gone
        self.works.append(dist.isend(piece, group=self.group, group_dst=peer))

    def receive(self, peer: int) -> Tensor:
        piece, work = self.arriving[peer]
        assert work is not None  # this rank is in the group
        work.wait()
        return piece

    def take(self, peer: int) -> Tensor:
        piece, work = self.arriving[peer]
        self.works.append(work)
        return piece

    def place(self, piece: Tensor) -> None:
        self.own = piece

    def whole(self) -> Tensor:
        assert self.own is not None
        return torch.cat([self.own if rank == self.rank else self.arriving[rank][0] for rank in range(self.size)])

    def end(self) -> None:
        for work in self.works:
            work.wait()
