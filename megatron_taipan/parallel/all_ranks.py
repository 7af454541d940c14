"""Shares what only one rank can see, a fault or an answer, with all ranks. Collective where there are several ranks."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_taipan.errors import UserError

Result = TypeVar("Result")


def world_size(group: Any = None) -> int:
    """Ranks of the run, or of one of its groups."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def this_rank() -> int:
    """This process's number in the run."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather_objects(mine: Any, group: Any = None) -> list[Any]:
    """Every rank's object, in the order of the ranks."""
    if world_size(group) == 1:
        return [mine]
    everyone: list[Any] = [None] * world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def attempt_on_all_ranks(
    action: Callable[[], Result], caught: type[Exception], describe: Callable[[Exception], str]
) -> tuple[Result | None, tuple[int, str] | None]:
    """Runs `action` on every rank, and reports to all the first rank on which it raised `caught`.

    So a fault that only one rank can see (a file missing on its host) ends the run at once, where otherwise the
    others would wait in the next collective until its timeout.

    Returns:
        this rank's result, and the first rank that failed with what `describe` returned for it; None where none failed.
    """
    result, fault = None, None
    try:
        result = action()
    except caught as error:
        fault = describe(error)
    faults = gather_objects(fault)
    return result, next(((rank, text) for rank, text in enumerate(faults) if text is not None), None)


def run_on_all_ranks(action: Callable[[], Result]) -> Result:
    """Runs `action` on every rank.

    Raises:
        UserError: it raised one on some rank; on all ranks, with one message.
    """
    result, fault = attempt_on_all_ranks(action, UserError, str)
    if fault is not None:
        rank, text = fault
        raise UserError(text if rank == 0 else f"rank {rank}: {text}")
    return result  # type: ignore[return-value]
