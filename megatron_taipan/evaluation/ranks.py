"""The processes that an evaluation runs as: alone, or ranks that each hold a consecutive piece of every context."""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taipan.data.piece import RowPiece
from megatron_taipan.errors import UserError
from megatron_taipan.inference.loading import parse_device
from megatron_taipan.parallel.all_ranks import run_on_all_ranks
from megatron_taipan.parallel.context import ContextParallel
from megatron_taipan.parallel.processes import RankInfo, device_of_process, join_processes

Result = TypeVar("Result")
TIMEOUT_S = 1800.0  # of a collective: how far apart the ranks may be, as parallel.timeout_s in training


@dataclass(frozen=True)
class Ranks:
    """This process among them. What several ranks do is collective: all of them call it, in the same order."""

    device: torch.device
    place: ContextParallel | None = None  # which piece of every context this rank holds; None: all of it, alone

    @property
    def size(self) -> int:
        return self.place.size if self.place else 1

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.place is None or self.place.rank == 0

    @property
    def piece(self) -> RowPiece:
        """What the dataset is asked for."""
        return RowPiece.held_at(self.place)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of the ranks' float64 numbers, [...] -> [...] on the CPU."""
        return self.place.sum_pieces(x.to(self.device)).cpu() if self.place else x

    def on_all(self, action: Callable[[], Result]) -> Result:
        """Does it on every rank; a UserError of one is raised on all."""
        return run_on_all_ranks(action) if self.place else action()

    def on_first(self, action: Callable[[], None]) -> None:
        """Does it on the first rank alone; its UserError is raised on all."""
        self.on_all(action if self.first else lambda: None)


@contextmanager
def joined_ranks(place: RankInfo, device: str) -> Iterator[Ranks]:
    """The processes, met and on their devices; all but the first print nothing and warn of nothing inside.

    Args:
        device: of --device.

    Raises:
        UserError: there is no such device, or none for this rank; or the processes do not meet.
    """
    if place.world_size == 1:
        yield Ranks(parse_device(device))
        return
    own = device_of_rank(place, device)
    if not dist.is_initialized():
        join_processes(place, own, TIMEOUT_S)
    ranks = Ranks(own, ContextParallel(place.world_size, place.rank, dist.group.WORLD))
    with nullcontext() if ranks.first else redirect_stdout(io.StringIO()), warnings.catch_warnings():
        # of the first rank only what a user can act on: torch says of collectives that it will rename them
        warnings.simplefilter("ignore", FutureWarning if ranks.first else Warning)
        yield ranks


def device_of_rank(place: RankInfo, name: str) -> torch.device:
    """The device of one of several ranks: the GPU of its number on its host, or the CPU.

    Raises:
        UserError: there is none, or one is named that all ranks of a host would share.
    """
    asked = parse_device(name)
    if name in ("auto", "cuda"):
        return device_of_process(place)
    if asked.type == "cpu":
        return asked
    raise UserError(f"--device {name} is one device for {place.world_size} processes; give auto, cuda or cpu")
