"""Many launches one after the other, each in processes of its own.

    results = launch_series([Job(2, train_some, tree), Job(4, train_more, tree), Job(1, compare, tree)])

Every job begins in the same untouched state, as runs that are started one after the other do; bf16 products, say, round
the same in each.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.distributed.launch import launch


@dataclass
class Job:
    """`function(*arguments)` on that many processes; the function stands at the top of a module."""

    processes: int
    function: Callable[..., Any]
    arguments: tuple = field(default=())

    def __init__(self, processes: int, function: Callable[..., Any], *arguments: Any):
        self.processes, self.function, self.arguments = processes, function, arguments


def launch_series(jobs: list[Job], timeout: float = 120.0) -> list[list[Any]]:
    """Runs the jobs in order; gives the results of each, by rank.

    Args:
        timeout: seconds for each job.

    Raises:
        AssertionError: a process of a job failed or took too long; the jobs after it are not run.
    """
    return [launch(job.processes, job.function, *job.arguments, timeout=timeout) for job in jobs]
