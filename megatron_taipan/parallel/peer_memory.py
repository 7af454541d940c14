"""Transfers through the GPUs' memory: chunks are written where the other rank reads them, by copy engines.

Unlike NCCL's kernels, copy engines take no multiprocessors from the products that run beside them. The scheme is that
of torch's fused_all_gather_matmul (torch/distributed/_symmetric_memory), but chunks are read where they arrive. Copies
within one GPU remain where all chunks must form one tensor (`place`) and where a sum outlives its buffer (`take`).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed._symmetric_memory as symmetric
from torch import Tensor

from megatron_taipan.parallel.overlapped_comm import OverlappedComm, Transfer

SLOTS = 2  # chunks of two transfers may be under way at once
ALIGNMENT = 512  # bytes
SMALL = 2**19  # bytes that `sum` takes


class PeerMemory(OverlappedComm):
    """Through memory that all GPUs of the group see (torch's symmetric memory, NVLink or PCIe peer access).

    For each slot a rank has space for one chunk of every rank, in their order, so that together they are one tensor. A
    chunk is copied there and then announced by a signal; the receiver signals back when it has used it, and until then
    no rank writes there again. So transfers may be recorded in CUDA graphs, and these replayed in any order that is the
    same on all ranks.

    Args:
        timeout_s: a chunk that does not arrive for so long ends the process.
    """

    def __init__(self, rank: int, size: int, group: Any, *, timeout_s: float):
        super().__init__(rank, size)
        self.group, self.timeout_ms = group, int(timeout_s * 1000)
        self.side = torch.cuda.Stream()
        self.buffers: list[_Buffer] = []  # the last one is the largest; graphs may have recorded the others
        self.next_slot = 0
        self.sums: Tensor | None = None  # symmetric memory of `sum`

    def sum(self, x: Tensor) -> Tensor | None:
        """Up to SMALL bytes of float32: each rank reads all others' at once (torch's one-shot kernel; no timeout)."""
        if x.dtype != torch.float32 or x.numel() * 4 > SMALL or x.numel() % 4:
            return None
        if self.sums is None:
            self.sums, _ = _shared(SMALL // 4, torch.float32, x.device, self.group)
        buffer = self.sums[: x.numel()].view(x.shape)
        return torch.ops.symm_mem.one_shot_all_reduce_copy(buffer, x.contiguous(), "sum", self.group.group_name)

    def start(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Transfer:
        n_bytes = dtype.itemsize * math.prod(shape)
        if not self.buffers or self.buffers[-1].capacity < n_bytes:
            self.make_buffer(n_bytes, device)
        slot, self.next_slot = self.next_slot, (self.next_slot + 1) % SLOTS
        return _PeerTransfer(self, self.buffers[-1], slot, shape, dtype)

    def make_buffer(self, n_bytes: int, device: torch.device) -> None:
        """Symmetric memory for chunks of that size; collective.

        Raises:
            torch.OutOfMemoryError: there is too little.
            RuntimeError: a GPU does not see the others' memory.
        """
        torch.cuda.empty_cache()  # this memory does not come from the caching allocator
        free, _ = torch.cuda.mem_get_info(device)
        if free < (needed := SLOTS * self.size * n_bytes):
            raise torch.OutOfMemoryError(f"{needed:,} bytes for exchanged tokens, {free:,} are free.")
        self.buffers.append(_Buffer(self, n_bytes, device))


def _shared(n: int, dtype: torch.dtype, device: torch.device, group: Any) -> tuple[Tensor, Any]:
    """Memory [n] that all ranks of the group see, and torch's handle of it; collective.

    torch clears the signals of new memory by work that it queues on the GPU, behind all that runs there, and the ranks
    meet on the host. A rank whose GPU was less busy could signal before that, and its signal would be cleared: both
    ranks would wait until the time is up (pytorch#196546 is the same in another allocator).
    """
    memory = symmetric.empty(n, dtype=dtype, device=device)
    torch.cuda.synchronize(device)
    return memory, symmetric.rendezvous(memory, group)


class _Buffer:
    """Symmetric memory for chunks of up to n_bytes; making one is a collective call.

    Attributes:
        capacity: bytes of the largest chunk; size * capacity are a slot's.
    """

    def __init__(self, comm: PeerMemory, n_bytes: int, device: torch.device):
        self.capacity = -(-n_bytes // ALIGNMENT) * ALIGNMENT
        self.memory, self.handle = _shared(SLOTS * comm.size * self.capacity, torch.uint8, device, comm.group)
        for slot in range(SLOTS):
            for peer in comm.peers:  # every slot is free
                self.handle.put_signal(peer, SLOTS + slot, comm.timeout_ms)


class _PeerTransfer:
    """The buffer's signals: channel `slot` says that a chunk arrived, channel SLOTS + slot that it was used."""

    def __init__(self, comm: PeerMemory, buffer: _Buffer, slot: int, shape: Sequence[int], dtype: torch.dtype):
        self.comm, self.buffer, self.slot, self.shape, self.dtype = comm, buffer, slot, tuple(shape), dtype
        self.sent: list[Tensor] = []
        self.unacknowledged = list(comm.peers)  # ranks that have had no signal yet that their chunk was used
        self.done: torch.cuda.Event | None = None  # the last work of this transfer on the side stream

    def _chunks(self, holder: int, first: int, n: int = 1) -> Tensor:
        """The chunks of n ranks from the first on, in the memory of `holder`: [n x chunk, ...]."""
        slot = self.slot * self.comm.size * self.buffer.capacity // self.dtype.itemsize
        shape = n * self.shape[0], *self.shape[1:]
        return self.buffer.handle.get_buffer(holder, shape, self.dtype, slot + first * math.prod(self.shape))

    def send(self, peer: int, chunk: Tensor) -> None:
        e, handle = self.comm, self.buffer.handle
        self.sent.append(chunk)  # or its memory would be reused while the side stream reads it
        e.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(e.side):
            handle.wait_signal(peer, SLOTS + self.slot, e.timeout_ms)
            self._chunks(peer, e.rank).copy_(chunk)
            handle.put_signal(peer, self.slot, e.timeout_ms)
        self.done = e.side.record_event()

    def receive(self, peer: int) -> Tensor:
        # not before this rank's chunks are sent: a graph whose branches run one by one could hang here
        self._await_side()
        self.buffer.handle.wait_signal(peer, self.slot, self.comm.timeout_ms)
        return self._chunks(self.comm.rank, peer)

    def take(self, peer: int) -> Tensor:
        e, handle = self.comm, self.buffer.handle
        # A slot's acknowledgement says that all of it has been used: the next chunks may be larger and elsewhere.
        assert e.size == 2, "one of several chunks cannot be acknowledged alone"
        chunk = torch.empty(self.shape, dtype=self.dtype, device=self.buffer.memory.device)
        e.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(e.side):  # after what this rank sends, as in `receive`
            handle.wait_signal(peer, self.slot, e.timeout_ms)
            chunk.copy_(self._chunks(e.rank, peer))
            handle.put_signal(peer, SLOTS + self.slot, e.timeout_ms)
        self.unacknowledged.remove(peer)
        self.done = e.side.record_event()
        return chunk

    def place(self, chunk: Tensor) -> None:
        e = self.comm
        self.sent.append(chunk)
        e.side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(e.side):
            self._chunks(e.rank, e.rank).copy_(chunk)
        self.done = e.side.record_event()

    def whole(self) -> Tensor:
        self._await_side()
        return self._chunks(self.comm.rank, 0, self.comm.size)

    def _await_side(self) -> None:
        if self.done is not None:
            torch.cuda.current_stream().wait_event(self.done)
            self.done = None

    def end(self) -> None:
        self._await_side()
        self.sent.clear()
        for peer in self.unacknowledged:
            self.buffer.handle.put_signal(peer, SLOTS + self.slot, self.comm.timeout_ms)
