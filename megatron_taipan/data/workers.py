"""Loader processes: forked from the training process, and sure to run.

A forked process inherits every lock that another thread of its parent held at that instant, and nobody there will give
it back. Collectives, CUDA and autograd keep such threads, so now and then a worker stops inside the fork itself, before
any of its own code: through the interpreter's list of threads in Python before 3.11.8 (python/cpython#112275), through
the C library's list of exit functions in any (pytorch/pytorch#130610). The trainer would wait for its first batch
for ever. So each worker says that it has begun, and workers of which one did not are forked again.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from megatron_taipan.errors import UserError

TRAINER_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
BEGIN_S = 30.0  # how long a worker has to begin, which takes milliseconds
TRIES = 3


def start_workers(
    dataset: Dataset, batches: Callable[[], Iterable[list[int]]], workers: int, *, begin_s: float = BEGIN_S
) -> Iterator[Any]:
    """What the dataset returns for each list of indices, in order, computed ahead by so many processes.

    Args:
        batches: gives the lists, from the first one on each time that it is called.
        begin_s: seconds that the workers have to begin.

    Raises:
        UserError: one of them did not, in TRIES tries.
    """
    # also where another start method is the default: workers share the trainer's dataset
    forks = "fork" in multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("fork" if forks else None)
    # workers start with these signals blocked, so that a worker cannot receive one before it ignores them
    before = signal.pthread_sigmask(signal.SIG_BLOCK, TRAINER_SIGNALS)
    try:
        for _ in range(TRIES):
            begun = context.Semaphore(0)
            loader = DataLoader(
                dataset, batch_sampler=batches(), num_workers=workers, collate_fn=_keep_batch,
                worker_init_fn=partial(_begin, begun), multiprocessing_context=context,
                generator=torch.Generator(),  # not the process's own, whose state is the run's
            )  # fmt: skip
            others = multiprocessing.active_children()
            results = iter(loader)
            if all(begun.acquire(timeout=begin_s) for _ in range(workers)):
                return results
            print(
                f"of {workers} loader processes (data.workers) not all began within {begin_s:g} s of their start; they"
                " are started again",
                file=sys.stderr,
                flush=True,
            )
            _kill([process for process in multiprocessing.active_children() if process not in others])
            del results
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    raise UserError(
        f"the {workers} loader processes did not begin within {begin_s:g} s in {TRIES} tries; data.workers=0 loads in"
        " the training process"
    )


def _kill(processes: list[BaseProcess]) -> None:
    """Ends workers that may hang. Torch raises an error in the main thread, out of any line of its code, when a worker
    dies; not while this does it."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if main else None
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    if main:
        signal.signal(signal.SIGCHLD, handler)


def _keep_batch(batch: Any) -> Any:
    return batch


def _begin(begun: Any, worker: int) -> None:
    """A worker's first own code.

    Ctrl-C and a scheduler's signals reach the whole process group; only the trainer may act on them. A worker ends when
    its trainer does: DataLoader's workers watch for that. SIGTERM stays blocked, since a thread waits for the
    trainer's: DataLoader and multiprocessing end a worker with it, and then wait for it without limit.
    """
    del worker
    others = set(TRAINER_SIGNALS) - {signal.SIGTERM}
    for name in others:
        signal.signal(name, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, others)
    threading.Thread(target=_exit_on_trainers_sigterm, daemon=True).start()
    begun.release()


def _exit_on_trainers_sigterm() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
