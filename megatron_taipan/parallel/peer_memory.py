"""Exchanges through the GPUs' memory: pieces are written where the other rank reads them, by copy engines.

Those take no multiprocessor from the products beside them, as NCCL's kernels do. The scheme is that of torch's
fused_all_gather_matmul (torch/distributed/_symmetric_memory), but pieces are read where they land. Copies within one
GPU remain where all pieces must form one tensor (`place`) and where a sum outlives its room (`take`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from megatron_taipan.parallel.exchange import OverlappedComm, Transfer

SLOTS = 2  # pieces of two exchanges may be under way at once
ALIGNMENT = 512  # bytes
SMALL = 2**19  # bytes that `sum` takes


class PeerMemory(OverlappedComm):
    """Through memory that all GPUs of the group see (torch's symmetric memory, NVLink or PCIe peer access).

    For each slot a rank has room for one piece of every rank, in their order, so that together they are one tensor. A
    piece is copied there and then announced by a signal; the receiver gives another one back when it has used it, and
    until then nobody writes there again. So exchanges may be recorded in CUDA graphs, and these replayed in whatever
    order, if it is the same on all ranks.

    Args:
        timeout_s: a piece that does not arrive for so long ends the process.
    """

    def __init__(self, rank: int, size: int, group: Any, *, timeout_s: float):
        super().__init__(rank, size)
        self.group, self.timeout_ms = group, int(timeout_s * 1000)
        self.side = torch.cuda.Stream()
        self.rooms: list[_Room] = []  # the last one is the largest; graphs may have recorded the others
        self.next_slot = 0
        self.sums: Tensor | None = None  # symmetric memory of `sum`

    def sum(self, x: Tensor) -> Tensor | None:
        """Up to SMALL bytes of float32: each rank reads all others' at once (torch's one-shot kernel; no timeout)."""
        if x.dtype != torch.float32 or x.numel() * 4 > SMALL or x.numel() % 4:
            return None
        if self.sums is None:
            self.sums = symmetric.empty(SMALL // 4, dtype=torch.float32, device=x.device)
            symmetric.rendezvous(self.sums, self.group)
        room = self.sums[: x.numel()].view(x.shape)
        return torch.ops.symm_mem.one_shot_all_reduce_copy(room, x.contiguous(), "sum", self.group.group_name)

    def start(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Transfer:
        n_bytes = dtype.itemsize * math.prod(shape)
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
        if free < (needed := SLOTS * self.size * n_bytes):
            raise torch.OutOfMemoryError(f"{needed:,} bytes for exchanged tokens, {free:,} are free.")
        self.rooms.append(_Room(self, n_bytes, device))


class _Room:
    """Symmetric memory for pieces of up to n_bytes; making one is a collective call.

    Attributes:
        capacity: bytes of the largest piece; size * capacity are a slot's.
    """

    def __init__(self, exchange: PeerMemory, n_bytes: int, device: torch.device):
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
        self.unacknowledged = list(exchange.peers)  # who have not been told that their piece was used
        self.done: torch.cuda.Event | None = None  # what this trip has on the side stream

    def _pieces(self, holder: int, first: int, n: int = 1) -> Tensor:
        """The pieces of n ranks from the first on, in the memory of `holder`: [n x piece, ...]."""
        slot = self.slot * self.exchange.size * self.room.capacity // self.dtype.itemsize
        shape = n * self.shape[0], *self.shape[1:]
        return self.room.handle.get_buffer(holder, shape, self.dtype, slot + first * math.prod(self.shape))

    def send(self, peer: int, piece: Tensor) -> None:
        e, handle = self.exchange, self.room.handle
        self.sent.append(piece)  # or its memory would be given out again while it is read on the side
        e.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(e.side):
            handle.wait_signal(peer, SLOTS + self.slot, e.timeout_ms)
            self._pieces(peer, e.rank).copy_(piece)
            handle.put_signal(peer, self.slot, e.timeout_ms)
        self.done = e.side.record_event()

    def receive(self, peer: int) -> Tensor:
        # not before our own pieces have left: a graph whose branches were run one by one could wait here for ever
        self._await_side()
        self.room.handle.wait_signal(peer, self.slot, self.exchange.timeout_ms)
        return self._pieces(self.exchange.rank, peer)

    def take(self, peer: int) -> Tensor:
        e, handle = self.exchange, self.room.handle
        # A slot's acknowledgement says that all of it has been used: the next pieces may be larger and lie elsewhere.
        assert e.size == 2, "one of several pieces cannot be given back alone"
        piece = torch.empty(self.shape, dtype=self.dtype, device=self.room.memory.device)
        e.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(e.side):  # behind what we send, as in `receive`
            handle.wait_signal(peer, self.slot, e.timeout_ms)
            piece.copy_(self._pieces(e.rank, peer))
            handle.put_signal(peer, SLOTS + self.slot, e.timeout_ms)
        self.unacknowledged.remove(peer)
        self.done = e.side.record_event()
        return piece

    def place(self, piece: Tensor) -> None:
        e = self.exchange
        self.sent.append(piece)
        e.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(e.side):
            self._pieces(e.rank, e.rank).copy_(piece)
        self.done = e.side.record_event()

    def whole(self) -> Tensor:
        self._await_side()
        return self._pieces(self.exchange.rank, 0, self.exchange.size)

    def _await_side(self) -> None:
        if self.done is not None:
            torch.cuda.current_stream().wait_event(self.done)
            self.done = None

    def end(self) -> None:
        self._await_side()
        self.sent.clear()
        for peer in self.unacknowledged:
            self.room.handle.put_signal(peer, SLOTS + self.slot, self.exchange.timeout_ms)
