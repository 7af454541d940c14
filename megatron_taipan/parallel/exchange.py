"""Tokens on their way between tensor ranks while products are computed, for sequence parallelism.

A collective sends everything and then the product starts, or the other way round. In pieces, one a rank, both go on at
once: `gather` computes on this rank's own piece while the others' arrive, `scatter` sends what others need before
it computes its own part. On GPUs the pieces are written into the other GPU's memory by its copy engines, which take no
multiprocessor from the product (the scheme of torch's fused_all_gather_matmul, without its copies into a workspace).

Ranks must make the same calls in the same order, as with collectives.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

SLOTS = 2  # pieces of two exchanges may be under way at once
ALIGNMENT = 512  # bytes
SMALL = 2**19  # bytes that `sum` takes


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


class Exchange:
    """Exchanges between the ranks of a tensor group.

    Attributes:
        whole_products: the forward pass leaves each product in one piece, so that selective recomputation can keep it.
    """

    def __init__(self, rank: int, size: int, *, whole_products: bool = False):
        self.rank, self.whole_products = rank, whole_products
        self.peers = [(rank + i) % size for i in range(1, size)]

    def start(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Trip:
        """Begins an exchange of pieces of that shape."""
        raise NotImplementedError

    def gather(self, piece: Tensor, use: Callable[[int, Tensor], object], whole: Tensor | None = None) -> None:
        """use(rank, that rank's piece) for every rank, this one's first, while the others are on their way.

        Args:
            whole: takes all pieces in the order of the ranks.
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
            make: this rank's part of the sum for that rank; called for the others first.
            meanwhile: work that hides the rest of the way.
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
        ranks = range(len(self.exchange.peers) + 1)
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

    def __init__(self, rank: int, size: int, group: Any, *, whole_products: bool = False):
        super().__init__(rank, size, whole_products=whole_products)
        self.group = group

    def start(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Trip:
        return _MessageTrip(self, shape, dtype, device)


class _MessageTrip:
    def __init__(self, exchange: Messages, shape: Sequence[int], dtype: torch.dtype, device: torch.device):
        self.group, self.sent, self.works = exchange.group, [], []  # type: ignore[var-annotated]
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


class PeerMemory(Exchange):
    """Through memory that all GPUs of the group see (torch's symmetric memory, NVLink or PCIe peer access).

    For each slot a rank has room for one piece of every rank. A piece is copied there and then announced by a signal;
    the receiver gives another one back when it has used it, and until then nobody writes there again. So exchanges may
    be recorded in CUDA graphs, and these replayed in whatever order, as long as it is the same on all ranks.

    Args:
        timeout_s: a piece that does not arrive for so long ends the process.
    """

    def __init__(self, rank: int, size: int, group: Any, *, timeout_s: float, whole_products: bool = False):
        super().__init__(rank, size, whole_products=whole_products)
        self.group, self.size, self.timeout_ms = group, size, int(timeout_s * 1000)
        self.side = torch.cuda.Stream()
        self.rooms: list[_Room] = []  # the last one is the largest; graphs may have recorded the others
        self.next_slot = 0
        self.sums: Tensor | None = None  # symmetric memory of `sum`

    def sum(self, x: Tensor) -> Tensor | None:
        """Up to SMALL bytes of float32: each rank reads all others' at once (torch's one-shot kernel; no timeout)."""
        if x.dtype != torch.float32 or x.numel() * 4 > SMALL or x.numel() % 4:
            return None
        if self.sums is None:
            import torch.distributed._symmetric_memory as symmetric

            self.sums = symmetric.empty(SMALL // 4, dtype=torch.float32, device=x.device)
            symmetric.rendezvous(self.sums, self.group)
        room = self.sums[: x.numel()].view(x.shape)
        return torch.ops.symm_mem.one_shot_all_reduce_copy(room, x.contiguous(), "sum", self.group.group_name)

    def start(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Trip:
        n_bytes = dtype.itemsize
        for n in shape:
            n_bytes *= n
        if not self.rooms or self.rooms[-1].capacity < n_bytes:
            self.make_room(n_bytes, device)
        slot, self.next_slot = self.next_slot, (self.next_slot + 1) % SLOTS
        return _PeerTrip(self, self.rooms[-1], slot, shape, dtype)

    def make_room(self, n_bytes: int, device: torch.device) -> None:
        """Symmetric memory for pieces of that size; collective.

        Raises:
            torch.OutOfMemoryError: there is too little.
            RuntimeError: a GPU does not see the others' memory.
        """
        torch.cuda.empty_cache()  # this memory is none of the caching allocator's
        free, _ = torch.cuda.mem_get_info(device)
        if free < SLOTS * self.size * n_bytes:
            raise torch.OutOfMemoryError(f"{SLOTS * self.size * n_bytes} bytes for exchanged tokens, {free} are free.")
        self.rooms.append(_Room(self, n_bytes, device))


class _Room:
    """Symmetric memory for pieces of up to `capacity` bytes. Making one is a collective call."""

    def __init__(self, exchange: PeerMemory, n_bytes: int, device: torch.device):
        import torch.distributed._symmetric_memory as symmetric

        self.capacity = -(-n_bytes // ALIGNMENT) * ALIGNMENT
        self.memory = symmetric.empty(SLOTS * exchange.size * self.capacity, dtype=torch.uint8, device=device)
        self.handle = symmetric.rendezvous(self.memory, exchange.group)
        for slot in range(SLOTS):
            for peer in exchange.peers:  # all is free
                self.handle.put_signal(peer, SLOTS + slot, exchange.timeout_ms)


class _PeerTrip:
    """Channel `slot` of the room's signals says that a piece has come, channel SLOTS + slot that it has been used."""

    def __init__(self, exchange: PeerMemory, room: _Room, slot: int, shape: Sequence[int], dtype: torch.dtype):
        self.exchange, self.room, self.slot, self.shape, self.dtype = exchange, room, slot, tuple(shape), dtype
        self.sent: list[Tensor] = []
        self.done: torch.cuda.Event | None = None  # what this trip has on the side stream

    def _place(self, holder: int, sender: int) -> Tensor:
        """Where in the memory of `holder` the sender's piece lies."""
        offset = (self.slot * self.exchange.size + sender) * self.room.capacity // self.dtype.itemsize
        return self.room.handle.get_buffer(holder, self.shape, self.dtype, offset)

    def send(self, peer: int, piece: Tensor) -> None:
        e, handle = self.exchange, self.room.handle
        self.sent.append(piece)  # or its memory would be given out again while it is read on the side
        e.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(e.side):
            handle.wait_signal(peer, SLOTS + self.slot, e.timeout_ms)
            self._place(peer, e.rank).copy_(piece)
            handle.put_signal(peer, self.slot, e.timeout_ms)
        self.done = e.side.record_event()

    def receive(self, peer: int) -> Tensor:
        # not before our own pieces have left: a graph whose branches were run one by one could wait here for ever
        self._await_side()
        self.room.handle.wait_signal(peer, self.slot, self.exchange.timeout_ms)
        return self._place(self.exchange.rank, peer)

    def join(self, pieces: list[Tensor], whole: Tensor) -> None:
        side = self.exchange.side
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for part, piece in zip(whole.chunk(len(pieces)), pieces, strict=True):
                part.copy_(piece)
        self.done = side.record_event()

    def _await_side(self) -> None:
        if self.done is not None:
            torch.cuda.current_stream().wait_event(self.done)
            self.done = None

    def end(self) -> None:
        self._await_side()
        self.sent.clear()
        for peer in self.exchange.peers:
            self.room.handle.put_signal(peer, SLOTS + self.slot, self.exchange.timeout_ms)
