"""Worker processes that take units' numbers and give notes back; no text and no ids cross processes.

Forked, so that the tokenizer is loaded once; a worker dies with its parent, and the parent notices a dead worker.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, cast

from megatron_taipan.errors import UserError

PR_SET_PDEATHSIG = 1


class Pool:
    """Workers that are forked once and then given several kinds of work, one after the other.

    Args:
        workers: processes.
        work: each kind by its name, a function of a unit's number.
    """

    def __init__(self, workers: int, work: dict[str, Callable[[int], object]]):
        self.workers, self.work = workers, work
        self.processes: list[tuple[Any, Connection]] = []

    def __enter__(self) -> "Pool":
        context = multiprocessing.get_context("fork")
        # workers are born with Ctrl-C blocked, so that none can hit one before it ignores it
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
        try:
            for _ in range(self.workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_worker, args=(self.work, theirs, os.getpid()), daemon=True)
                process.start()
                theirs.close()
                self.processes.append((process, ours))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self

    def __exit__(self, *exception) -> None:
        for process, connection in self.processes:
            connection.close()
            process.kill()  # SIGTERM would wait for as long as a worker is stopped
        for process, _ in self.processes:
            process.join()

    def run(self, kind: str, numbers: list[int], tick: Callable[[], None] = lambda: None) -> Iterator[tuple]:
        """Yields (number, result) in the order of completion; the first numbers go to a worker each.

        Args:
            tick: called about twice a second meanwhile.

        Raises:
            UserError, OSError: raised by the work; UserError also where a worker was killed.
        """
        queue = iter(numbers)
        running: dict[Connection, tuple[Any, int]] = {}  # process and the number it works on
        for process, connection in self.processes:
            _give(kind, connection, process, queue, running)
        while running:
            for ready in cast(list[Connection], wait(list(running), timeout=0.5)):
                process, number = running.pop(ready)
                try:
                    answer = ready.recv()
                except (EOFError, OSError):
                    process.join(5)
                    raise UserError(_died(process.exitcode)) from None
                if isinstance(answer, BaseException):
                    raise answer
                _give(kind, ready, process, queue, running)
                yield number, answer
            tick()


def _give(kind: str, connection: Connection, process, queue: Iterator[int], running: dict) -> None:
    number = next(queue, None)
    if number is not None:
        try:
            connection.send((kind, number))
        except OSError:  # it died while it was idle
            process.join(5)
            raise UserError(_died(process.exitcode)) from None
        running[connection] = (process, number)


def _died(exitcode: int | None) -> str:
    why = (
        f"killed by signal {-exitcode} ({signal.Signals(-exitcode).name})"
        if exitcode is not None and exitcode < 0
        else f"exit {exitcode}"
    )
    memory = ", most often the kernel's answer to too little memory: use fewer --workers" if exitcode == -9 else ""
    return f"a worker process died: {why}{memory}; what was finished is kept; run the same command to continue"


def _worker(work: dict[str, Callable[[int], object]], connection: Connection, parent: int) -> None:
    """Answers each kind and number with the result or the exception."""
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        try:
            kind, number = connection.recv()
        except EOFError:
            return
        try:
            answer = work[kind](number)
        except UserError as error:
            answer = error
        except OSError as error:
            answer = error
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        connection.send(answer)


def die_with(parent: int) -> None:
    """Asks Linux to kill this process when its parent is gone; elsewhere nothing happens."""
    try:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    except (AttributeError, OSError):
        return
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)
