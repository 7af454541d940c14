"""Sends tokens between tensor ranks while products are computed, for sequence parallelism.

A collective sends everything and then the product starts, or the other way round. In chunks, one a rank, both run at
once: `gather` computes on this rank's own chunk while the others' arrive, `scatter` sends what others need before
it computes its own part. Subclasses send the chunks: `Messages` here, for CPUs, and peer_memory.py for GPUs.

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
    """One round of communication: at most one chunk to and from every other rank, all of one shape."""

    def send(self, peer: int, chunk: Tensor) -> None:
        """Starts sending the chunk, which must not change before `end`."""

    def receive(self, peer: int) -> Tensor:
        """The chunk from that rank, valid until `end`."""

    def take(self, peer: int) -> Tensor:
        """The only chunk that arrives, as a new tensor, complete at `end`; in place of `receive`, between two ranks."""

    def place(self, chunk: Tensor) -> None:
        """Starts copying this rank's own chunk where `whole` needs it; the chunk must not change before `whole`."""

    def whole(self) -> Tensor:
        """All chunks, concatenated in the order of the ranks, once all are placed or received; valid until `end`."""

    def end(self) -> None:
        """Everything received has been used."""


class OverlappedComm(ABC):
    """Communication between the ranks of a tensor group that runs beside products."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self.peers = [(rank + i) % size for i in range(1, size)]

    @abstractmethod
    def start(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Transfer:
        """Begins a transfer of chunks of that shape."""

    def gather(
        self, chunk: Tensor, use: Callable[[int, Tensor], object], use_whole: Callable[[Tensor], Any] | None = None
    ) -> Any:
        """use(rank, that rank's chunk) for every rank, this one's first, while the others are on their way.

        Args:
            chunk: [n/size, ...], of the same shape on every rank.
            use_whole: is given [n, ...], all chunks in the order of the ranks, last; valid until it returns.

        Returns:
            What use_whole returns.
        """
        fetch = Fetch(self, chunk, whole=use_whole is not None)
        use(self.rank, chunk)
        for peer in self.peers:
            use(peer, fetch.receive(peer))
        result = use_whole(fetch.whole()) if use_whole is not None else None
        fetch.end()
        return result

    def sum(self, x: Tensor) -> Tensor | None:
        """The ranks' sum of a small tensor, in less time than a collective takes to start; None if impossible."""
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
            meanwhile: work to do while the parts are under way.
            add: adds make(this rank) to a tensor in place; with `meanwhile`, and two ranks, called instead of
                make(this rank), so that nothing is left to add up.

        Returns:
            [n/size, ...], a new tensor.
        """
        transfer = None
        for peer in self.peers:
            part = make(peer)
            transfer = transfer or self.start(part.shape, part.dtype, part.device)
            transfer.send(peer, part)
        assert transfer is not None
        # without other work, making this rank's part is what overlaps the transfer, so it cannot wait for the others'
        if meanwhile is not None and add is not None and self.size == 2:
            total = transfer.take(self.peers[0])
            meanwhile()
            transfer.end()
            add(total)
            return total
        mine = make(self.rank)
        if meanwhile is not None:
            meanwhile()
        total = add_up(mine, [transfer.receive(peer) for peer in self.peers])
        transfer.end()
        return total


class Fetch:
    """Chunks under way from all other ranks to this one, and from this one to them.

    Args:
        whole: whether `whole` will be asked for.
    """

    def __init__(self, comm: OverlappedComm, chunk: Tensor, *, whole: bool = True):
        self.peers, self.received, self.placed = comm.peers, dict[int, Tensor](), whole
        self.transfer = comm.start(chunk.shape, chunk.dtype, chunk.device)
        for peer in self.peers:
            self.transfer.send(peer, chunk)
        if whole:
            self.transfer.place(chunk)

    def receive(self, peer: int) -> Tensor:
        """The chunk from that rank, valid until `end`."""
        if peer not in self.received:  # a message can be waited for only once
            self.received[peer] = self.transfer.receive(peer)
        return self.received[peer]

    def whole(self) -> Tensor:
        """All chunks in the order of the ranks, [ranks x chunk, ...], valid until `end`."""
        assert self.placed, "this rank's own chunk is not among the others'"
        for peer in self.peers:
            self.receive(peer)
        return self.transfer.whole()

    def end(self) -> None:
        """The chunks have been used."""
        self.transfer.end()


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
        return _MessageTransfer(self, shape, dtype, device)


class _MessageTransfer:
    def __init__(self, comm: Messages, shape: Sequence[int], dtype: torch.dtype, device: torch.device):
        self.group, self.rank, self.size = comm.group, comm.rank, comm.size
        self.own: Tensor | None = None
        self.sent: list[Tensor] = []
        self.works: list[Any] = []
        self.arriving = {}
        for peer in comm.peers:
            chunk = torch.empty(*shape, dtype=dtype, device=device)
            self.arriving[peer] = chunk, dist.irecv(chunk, group=self.group, group_src=peer)

    def send(self, peer: int, chunk: Tensor) -> None:
        chunk = chunk.contiguous()
        self.sent.append(chunk)  # alive until it is sent
        self.works.append(dist.isend(chunk, group=self.group, group_dst=peer))

    def receive(self, peer: int) -> Tensor:
        chunk, work = self.arriving[peer]
        assert work is not None  # this rank is in the group
        work.wait()
        return chunk

    def take(self, peer: int) -> Tensor:
        chunk, work = self.arriving[peer]
        self.works.append(work)
        return chunk

    def place(self, chunk: Tensor) -> None:
        self.own = chunk

    def whole(self) -> Tensor:
        assert self.own is not None
        return torch.cat([self.own if rank == self.rank else self.arriving[rank][0] for rank in range(self.size)])

    def end(self) -> None:
        for work in self.works:
            work.wait()
