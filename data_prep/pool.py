"""Worker processes that take piece numbers and give notes back; no text and no ids cross processes.

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


def run_pool(
    work: Callable[[int], object], numbers: list[int], workers: int, tick: Callable[[], None]
) -> Iterator[tuple]:
    """Yields (number, work(number)) in the order of completion; calls `tick` twice a second meanwhile.

    Raises:
        UserError: raised by `work`, or a worker was killed.
    """
    context = multiprocessing.get_context("fork")
    queue = iter(numbers)
    running: dict[Connection, tuple[Any, int]] = {}  # process and the number it works on
    processes = []
    try:
        for _ in range(min(workers, len(numbers))):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(work, theirs, os.getpid()), daemon=True)
            process.start()
            theirs.close()
            processes.append((process, ours))
            _give(ours, process, queue, running)
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
                _give(ready, process, queue, running)
                yield number, answer
            tick()
    finally:
        for process, connection in processes:
            connection.close()
            process.terminate()
        for process, _ in processes:
            process.join()


def _give(connection: Connection, process, queue: Iterator[int], running: dict) -> None:
    number = next(queue, None)
    if number is not None:
        try:
            connection.send(number)
        except OSError:  # it died while it was idle
            process.join(5)
            raise UserError(_died(process.exitcode)) from None
        running[connection] = (process, number)


def _died(exitcode: int | None) -> str:
    why = (
        f"killed by signal {-exitcode} ({signal.Signals(-exitcode).name})"
        if (exitcode or 0) < 0
        else f"exit {exitcode}"
    )
    memory = ", most often the kernel's answer to too little memory: use fewer --workers" if exitcode == -9 else ""
    return f"a worker process died: {why}{memory}; what was finished is kept, the same command continues"


def _worker(work: Callable[[int], object], connection: Connection, parent: int) -> None:
    """Answers each number with the result or the exception."""
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        try:
            number = connection.recv()
        except EOFError:
            return
        try:
            answer = work(number)
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
