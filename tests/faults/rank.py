"""What a forked rank does: it prepares its fault, then runs the real program.

A fault is a dictionary with the rank it is meant for (`rank`, null for all) and one of

    kill_at_operation: N            SIGKILL at the N-th file operation (open, fsync, rename, delete, ...) of its saves
    signal_in: evaluate | save | step | start, nth: N, signal: name      sends itself a signal there, the N-th time
    hang_at_step: N                 never returns from the N-th step
    clock: seed                     the wall clock jumps by up to a year, back and forth, at every look
"""

import importlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # making an optimizer imports it
import torch.utils.tensorboard

import launch.pretrain
from megatron_taipan.checkpoint import state
from megatron_taipan.train import loop, pipeline  # noqa: F401
from megatron_taipan.train.distributed import import_deepspeed

import_deepspeed(torch.device("cpu"))
importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # DeepSpeed looks there at its first engine
torch.set_num_threads(1)
assert threading.active_count() == 1, "only a process without threads may be forked"


def run_rank(task: dict[str, Any], number: int, port: int) -> None:
    """One rank, from its environment to its exit; never returns."""
    os.environ.update(
        RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE=str(task["ranks"]), LOCAL_WORLD_SIZE=str(task["ranks"]),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="faults",
    )  # fmt: skip
    fault = task["inside"] or {}
    if fault and fault.get("rank") in (None, number):
        prepare(fault)
    status = 1
    try:
        status = launch.pretrain.main(["--config", task["config"], *task.get("overrides", [])])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def prepare(fault: dict[str, Any]) -> None:
    """Makes the fault happen later on."""
    if "kill_at_operation" in fault:
        kill_at_operation(fault["kill_at_operation"])
    if "signal_in" in fault:
        number = getattr(signal, fault.get("signal", "SIGTERM"))
        on_call(fault["signal_in"], fault.get("nth", 1), lambda: os.kill(os.getpid(), number))
    if "hang_at_step" in fault:
        on_call("step", fault["hang_at_step"], lambda: time.sleep(3600))
    if "clock" in fault:
        jumping_clock(fault["clock"])


PLACES = {
    "start": (loop, "open_data"),
    "evaluate": (loop, "evaluate"),
    "step": (loop, "train_step"),
    "save": (state, "own_tensors"),
    "write": (state, "write_tensors"),
}


def on_call(place: str, nth: int, action: Callable[[], None]) -> None:
    """Runs `action` before the N-th call of a function of the product."""
    module, name = PLACES[place]
    function, calls = getattr(module, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth:
            action()
        return function(*args, **kwargs)

    setattr(module, name, counted)


def kill_at_operation(nth: int) -> None:
    """SIGKILL at the N-th operation on files of checkpoints."""
    seen, lock = [0], threading.Lock()

    def operation() -> None:
        with lock:
            seen[0] += 1
            if seen[0] == nth:
                os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree") and any(
            isinstance(a, str | os.PathLike) and ("step_0" in os.fspath(a) or Path(os.fspath(a)).name[:6] == "latest")
            for a in arguments
        ):
            operation()

    fsync = os.fsync

    def counted_fsync(handle: int) -> None:
        operation()
        fsync(handle)

    os.fsync = counted_fsync
    sys.addaudithook(audit)


def jumping_clock(seed: int) -> None:
    """`time.time` as of a machine whose clock is corrected all the time."""
    rng, real = random.Random(seed), time.time
    time.time = lambda: real() + rng.uniform(-3e7, 3e7)
