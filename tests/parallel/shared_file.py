"""Stands in for GPUs that see each other's memory: files that all processes map, streams that are none.

Signals are as torch's: one is put where the last one was taken, else waited for. Those of new memory are cleared when
the host waits for the GPU, or else, on rank 0, a while after the ranks have met. It shows whether pieces lie where they
are read and whether each is waited for and given back; what runs beside what on a GPU it cannot show.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

CHANNELS = 8
LATE = 0.3  # seconds by which a busy GPU clears its signals too late


class NoStream:
    def wait_stream(self, other: "NoStream") -> None:
        pass

    def record_event(self) -> object:
        return object()

    def wait_event(self, event: object) -> None:
        pass


class Handle:
    """What torch's rendezvous gives: the memory and the signals of every rank."""

    def __init__(self, folder: Path, room: int, rank: int, size: int, n_bytes: int):
        self.rank = rank
        self.memory = [np.memmap(made(folder / f"memory {room} {r}", n_bytes), np.uint8) for r in range(size)]
        signals = [np.memmap(made(folder / f"signals {room} {r}", CHANNELS * size), np.uint8) for r in range(size)]
        self.signals = [s.reshape(CHANNELS, size) for s in signals]

    def get_buffer(self, rank: int, shape: tuple[int, ...], dtype: torch.dtype, offset: int) -> torch.Tensor:
        whole = torch.from_numpy(self.memory[rank]).view(dtype)
        n = int(np.prod(shape))
        assert offset + n <= len(whole), f"{offset} + {n} of {len(whole)}"
        return whole[offset : offset + n].view(shape)

    def put_signal(self, peer: int, channel: int, timeout_ms: int) -> None:
        self._turn(self.signals[peer], channel, self.rank, 1, timeout_ms)

    def wait_signal(self, peer: int, channel: int, timeout_ms: int) -> None:
        self._turn(self.signals[self.rank], channel, peer, 0, timeout_ms)

    def _turn(self, pad: np.ndarray, channel: int, source: int, to: int, timeout_ms: int) -> None:
        end = time.monotonic() + timeout_ms / 1000
        while pad[channel, source] == to:
            assert time.monotonic() < end, f"rank {self.rank} waits on channel {channel} of rank {source}"
            time.sleep(1e-4)
        pad[channel, source] = to


def made(path: Path, n_bytes: int) -> Path:
    """A file of zeros, unless another process has made it."""
    with open(path, "ab") as file:
        file.truncate(n_bytes)
    return path


@contextmanager
def pretended_gpus(folder: Path, rank: int, size: int) -> Iterator[None]:
    """In here symmetric memory of this process is the files of `folder`."""
    rooms: list[Handle] = []
    queued: list[torch.Tensor] = []  # memory whose signals the GPU has yet to clear

    def empty(*shape: int, **options: Any) -> torch.Tensor:
        queued.append(torch.empty(*shape, **options))
        return queued[-1]

    def rendezvous(memory: torch.Tensor, group: object) -> Handle:
        rooms.append(Handle(folder, len(rooms), rank, size, memory.numel()))
        dist.barrier()
        if queued and rank == 0:  # whose GPU is the busy one
            time.sleep(LATE)
            rooms[-1].signals[rank][:] = 0
        queued.clear()
        return rooms[-1]

    with ExitStack() as stack:
        for name, stand_in in {
            "Stream": NoStream, "current_stream": NoStream, "stream": lambda stream: nullcontext(),
            "empty_cache": lambda: None, "mem_get_info": lambda device: (2**40, 2**40),
            "synchronize": lambda device=None: queued.clear(),
        }.items():  # fmt: skip
            stack.enter_context(patch.object(torch.cuda, name, stand_in))
        symmetric = torch.distributed._symmetric_memory
        stack.enter_context(patch.object(symmetric, "empty", empty))
        stack.enter_context(patch.object(symmetric, "rendezvous", rendezvous))
        yield
