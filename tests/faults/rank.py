"""What a forked rank does: it prepares its fault, then runs the real program.

A fault is a dictionary with the rank it is meant for (`rank`, null for all) and one of

    count: true                     prints the number of file operations of its saves at its end
    slow_writes: S                  every tensor of a checkpoint takes S seconds longer to write
    kill_at_operation: N            SIGKILL at the N-th file operation (open, fsync, rename, delete, ...) of its saves
    signal_in: evaluate | save | step | start, nth: N, signal: name      sends itself a signal there, the N-th time
    hang_at_step: N                 never returns from the N-th step
    nan_at_step: N                  the N-th update leaves a parameter of this rank (of `victim`) that is not finite
    loss_nan_from_step: N           from the N-th step on no loss is finite
    clock: seed                     the wall clock jumps by up to a year, back and forth, at every reading
"""

import importlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo  # making an optimizer imports it
import torch.utils.tensorboard

from megatron_taipan import pretrain
from megatron_taipan.checkpoint import files, saving
from megatron_taipan.engine import pipeline  # noqa: F401
from megatron_taipan.engine.startup import import_deepspeed
from megatron_taipan.engine.state_shards import held_shards, spread_masters
from megatron_taipan.train import loop, saver, start
from megatron_taipan.train import run as run_state

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
    at_end: list[Callable[[], None]] = []
    if fault and fault.get("rank") in (None, number):
        arm(fault, at_end)
    status = 1
    try:
        status = pretrain.main(["--config", task["config"]])
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        for action in at_end:
            action()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def arm(fault: dict[str, Any], at_end: list[Callable[[], None]]) -> None:
    """Makes the fault happen later on; adds to `at_end` what must be done when the program has returned."""
    if "count" in fault or "kill_at_operation" in fault:
        operations = Operations(fault.get("kill_at_operation", 0))
        at_end.append(lambda: print("operations:", operations.seen, file=sys.stderr))
    if "slow_writes" in fault:
        raw_bytes = files.raw_bytes
        files.raw_bytes = lambda tensor: (time.sleep(fault["slow_writes"]), raw_bytes(tensor))[1]
    if "signal_in" in fault:
        number = getattr(signal, fault.get("signal", "SIGTERM"))
        on_call(fault["signal_in"], fault.get("nth", 1), lambda: os.kill(os.getpid(), number))
    if "hang_at_step" in fault:
        on_call("step", fault["hang_at_step"], lambda: time.sleep(3600))
    if "nan_at_step" in fault:
        around_steps(lambda step, engine, run, groups: _leave_nan(fault, step, engine, run, groups))
    if "loss_nan_from_step" in fault:
        around_steps(lambda step, engine, run, groups: _with_nan(fault, step, engine, run))
    if "clock" in fault:
        jumping_clock(fault["clock"])


# moments of a run, as functions of the product by module and name
HOOKS: dict[str, tuple[Any, str]] = {
    "start": (start, "open_stage_data"),
    "evaluate": (run_state, "evaluate"),
    "step": (loop, "train_step"),
    "save": (saver, "take_snapshot"),
    "write": (saving, "write_tensors"),
}


def on_call(hook: str, nth: int, action: Callable[[], None]) -> None:
    """Runs `action` before the N-th call of a function of the product."""
    module, name = HOOKS[hook]
    function, calls = getattr(module, name), [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth:
            action()
        return function(*args, **kwargs)

    setattr(module, name, counted)


def around_steps(with_fault: Callable[..., Any]) -> None:
    """Replaces every step by `with_fault(step, engine, run, groups)`; `run()` takes the step."""
    train_step = loop.train_step

    def taken(engine: Any, batches: Any, *, step: int, groups: Any, **kwargs: Any) -> Any:
        def run() -> Any:
            return train_step(engine, batches, step=step, groups=groups, **kwargs)

        return with_fault(step + 1, engine, run, groups)

    loop.train_step = taken


def _leave_nan(fault: dict[str, Any], step: int, engine: Any, run: Callable[[], Any], groups: Any) -> Any:
    result = run()
    if step == fault["nan_at_step"]:
        if int(os.environ["RANK"]) == fault["victim"]:
            held_shards(engine, groups.zero_rank)[0].tensor("master")[0] = float("nan")
        spread_masters(engine)
    return result


def _with_nan(fault: dict[str, Any], step: int, engine: Any, run: Callable[[], Any]) -> Any:
    if step < fault["loss_nan_from_step"]:
        return run()
    parameters = list(engine.module.parameters())
    values = [p.data for p in parameters] + [p.ds_tensor.data for p in parameters if hasattr(p, "ds_tensor")]
    before = [value.clone() for value in values]
    for value in values:
        value.fill_(float("nan"))
    result = run()
    for value, was in zip(values, before, strict=True):
        value.copy_(was)
    return result


class Operations:
    """Counts the operations on files of checkpoints, and kills this process before one of them."""

    def __init__(self, fatal: int):
        self.fatal, self.seen, self.lock = fatal, 0, threading.Lock()
        self.fsync = os.fsync
        os.fsync = self._fsync
        sys.addaudithook(self._audit)

    def _one(self) -> None:
        with self.lock:
            self.seen += 1
            if self.seen == self.fatal:
                os.kill(os.getpid(), signal.SIGKILL)

    def _fsync(self, handle: int) -> None:
        self._one()
        self.fsync(handle)

    def _audit(self, event: str, arguments: tuple) -> None:
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
            return
        paths = [os.fspath(a) for a in arguments if isinstance(a, str | os.PathLike)]
        if any("/step_0" in path or os.path.basename(path).startswith("latest") for path in paths):
            self._one()


def jumping_clock(seed: int) -> None:
    """`time.time` as on a machine whose clock is corrected all the time."""
    rng, real = random.Random(seed), time.time
    time.time = lambda: real() + rng.uniform(-3e7, 3e7)
