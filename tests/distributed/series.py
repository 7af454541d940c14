"""Many short launches one after the other, each in fresh processes, for the price of one start.

    results = launch_series([Job(2, train_some, tree), Job(4, train_more, tree), Job(1, compare, tree)])

`launch` pays seconds of imports in every process. Here one process imports torch and DeepSpeed and then forks the
processes of each job, which join a process group of their own. So every job begins in the same untouched state, as runs
that are started one after the other do; bf16 products, say, round the same in each.
"""

import faulthandler
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_taipan.train.distributed import free_port
from tests.distributed.launch import ROOT, process_env


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
    with tempfile.TemporaryDirectory(prefix="taipan-test-") as folder:
        tasks = [(j.processes, j.function.__module__, j.function.__name__, j.arguments) for j in jobs]
        Path(folder, "task").write_bytes(pickle.dumps((tasks, timeout)))
        command = [sys.executable, "-m", "tests.distributed.series", folder]
        with open(Path(folder, "output"), "wb") as output:
            parent = subprocess.Popen(
                command, cwd=ROOT, env=process_env(0, 1, 0), stdout=output, stderr=output, start_new_session=True
            )
        try:
            code = parent.wait(60 + timeout * len(jobs))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if parent.poll() is None:
                os.killpg(parent.pid, signal.SIGKILL)
                parent.wait()
        if code != 0:
            text = Path(folder, "output").read_text(errors="replace")
            raise AssertionError(f"a job failed (exit status {code})\n{text[-6000:]}")
        return [
            [pickle.loads(Path(folder, f"result{number}.{rank}").read_bytes()) for rank in range(job.processes)]
            for number, job in enumerate(jobs)
        ]


def main(folder: Path) -> int:
    """The parent of all jobs."""
    import importlib

    import torch

    from megatron_taipan.train.distributed import import_deepspeed

    tasks, timeout = pickle.loads((folder / "task").read_bytes())
    torch.set_num_threads(1)
    import_deepspeed(torch.device("cpu"))
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # DeepSpeed looks there at its first engine
    import torch._dynamo  # making an optimizer imports it

    import megatron_taipan.train.loop  # noqa: F401  # what most jobs need

    for number, (processes, module, name, arguments) in enumerate(tasks):
        function, port = getattr(importlib.import_module(module), name), free_port()
        children = []
        for rank in range(processes):
            child = os.fork()
            if child == 0:
                os.environ.update(process_env(rank, processes, port))
                run(function, arguments, folder / f"result{number}.{rank}", timeout)
            children.append(child)
        if any(wait_for(children, timeout + 5)):
            print(f"job {number}, {name} on {processes} processes, failed", flush=True)
            return 1
    return 0


def run(function: Callable[..., Any], arguments: tuple, result: Path, timeout: float) -> None:
    """One process of a job; never returns."""
    import torch

    from megatron_taipan.train.distributed import find_place, start_processes, stop_processes

    code = 1
    try:
        faulthandler.dump_traceback_later(timeout, exit=True)
        start_processes(find_place(os.environ), torch.device("cpu"), timeout)
        result.write_bytes(pickle.dumps(function(*arguments)))
        stop_processes()
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait_for(children: list[int], timeout: float) -> list[int]:
    """Exit statuses of all; when one fails the others have five seconds to follow, then all are killed."""
    end, statuses = time.monotonic() + timeout, {}
    while len(statuses) < len(children):
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            statuses[child] = status
            if status:
                end = min(end, time.monotonic() + 5)
        elif time.monotonic() > end:
            for late in set(children) - statuses.keys():
                os.kill(late, signal.SIGKILL)
            end = float("inf")
        else:
            time.sleep(0.02)
    return [statuses[child] for child in children]


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
