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


class Trip(Protocol):
    """One exchange: at most one piece to and from every other rank, all of one shape."""

    def send(self, peer: int, piece: Tensor) -> None:
        """Starts it; the piece must not change before `end`."""

    def receive(self, peer: int) -> Tensor:
        """The piece from there, valid until `end`."""

    def join(self, pieces: list[Tensor], whole: Tensor) -> None:
        """Starts to copy the pieces, one behind the other, into `whole`, which is complete at `end`."""

    def end(self) -> None:
        """Everything received has been used."""


class Exchange(ABC):
    """Exchanges between the ranks of a tensor group."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self.peers = [(rank + i) % size for i in range(1, size)]

    @abstractmethod
    def start(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Trip:
        """Begins an exchange of pieces of that shape."""

    def gather(self, piece: Tensor, use: Callable[[int, Tensor], object], whole: Tensor | None = None) -> None:
        """use(rank, that rank's piece) for every rank, this one's first, while the others are on their way.

        Args:
            piece: [n/size, ...], of the same shape on every rank.
            whole: [n, ...], takes all pieces in the order of the ranks.
        """
        fetch = Fetch(self, piece)
        use(self.rank, piece)
        for peer in self.peers:
            received = fetch.receive(peer)
            if whole is not None and peer == self.peers[-1]:
                fetch.join(whole)
            use(peer, received)
        fetch.end()

    def sum(self, x: Tensor) -> Tensor | None:
        """The ranks' sum of a small tensor, in less time than a collective starts; None where that cannot be."""
        return None

    def scatter(self, make: Callable[[int], Tensor], meanwhile: Callable[[], None] = lambda: None) -> Tensor:
        """The ranks' sum of make(this rank).

        Args:
            make: this rank's part [n/size, ...] of the sum for that rank; called for the others first.
            meanwhile: work that hides the rest of the way.

        Returns:
            [n/size, ...], a new tensor.
        """
        trip = None
        for peer in self.peers:
            part = make(peer)
            trip = trip or self.start(part.shape, part.dtype, part.device)
            trip.send(peer, part)
        mine = make(self.rank)
        assert trip is not None
        meanwhile()
        parts = [trip.receive(peer) for peer in self.peers]
        total = add_up(mine, parts)
        trip.end()
        return total


class Fetch:
    """The pieces of all ranks on their way to this one, and this one's to them."""

    def __init__(self, exchange: Exchange, piece: Tensor):
        self.exchange, self.pieces = exchange, {exchange.rank: piece}
        self.trip = exchange.start(piece.shape, piece.dtype, piece.device)
        for peer in exchange.peers:
            self.trip.send(peer, piece)

    def receive(self, peer: int) -> Tensor:
        """The piece from there, valid until `end`."""
        if peer not in self.pieces:
            self.pieces[peer] = self.trip.receive(peer)
        return self.pieces[peer]

    def join(self, whole: Tensor) -> None:
        """Waits for all pieces and starts to copy them into `whole`, [ranks x piece, ...], complete at `end`."""
        ranks = range(self.exchange.size)
        self.trip.join([self.receive(rank) for rank in ranks], whole)

    def end(self) -> None:
        """The pieces have been used."""
        self.trip.end()


def add_up(mine: Tensor, others: list[Tensor]) -> Tensor:
    """The sum, rounded once to the parts' type."""
    if len(others) == 1:
        return mine + others[0]
    wide = torch.float64 if mine.dtype == torch.float64 else torch.float32
    total = mine.to(wide) + others[0]  # a new tensor: `mine` may be part of the caller's
    for part in others[1:]:
        total += part
    return total.to(mine.dtype)


class Messages(Exchange):
    """Through the group's own messages: gloo on CPUs."""

    def __init__(self, rank: int, size: int, group: Any):
        super().__init__(rank, size)
        self.group = group

    def start(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Trip:
        return _MessageTrip(self, shape, dtype, device)


class _MessageTrip:
    def __init__(self, exchange: Messages, shape: Sequence[int], dtype: torch.dtype, device: torch.device):
        self.group = exchange.group
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
        work.wait()
        return piece

    def join(self, pieces: list[Tensor], whole: Tensor) -> None:
        torch.cat(pieces, out=whole)

    def end(self) -> None:
        for work in self.works:
            work.wait()
