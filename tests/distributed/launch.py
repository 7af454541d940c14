"""Starts real processes for a test and brings back what they return.

    results = launch(2, cases.compare_stages, [1, 2, 3])

runs `compare_stages([1, 2, 3])` in two processes that have joined a gloo group, and returns both results. They are
forked from a process that has the imports behind it (forks.py); on_gpu they are fresh ones in an NCCL group, one GPU
each, where a start costs seconds and a function had better run many cases.
"""

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_taipan.parallel.processes import free_port
from tests.distributed.forks import kill_with_stacks, the_forks

ROOT = Path(__file__).resolve().parents[2]


def same_packages() -> dict[str, str]:
    """The `env` of processes that find what this one finds, also where Triton lies beside the environment."""
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


def launch(
    processes: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout: float = 300.0,
    env: dict[str, str] | None = None,
    join: bool = True,
    on_gpu: bool = False,
) -> list[Any]:
    """Runs `function(*arguments)` in that many new processes.

    Args:
        function: importable, at the top of a module; arguments and results are pickled.
        timeout: seconds until all are killed, with their stacks in the failure.
        env: more environment variables; the processes are then fresh interpreters, which read them from their start.
        join: whether the processes join a process group before and leave it after the call.
        on_gpu: each process has the GPU of its rank; else none.

    Returns:
        The results, by rank.

    Raises:
        AssertionError: a process failed or the time is up; the message carries the end of every rank's stderr.
    """
    with tempfile.TemporaryDirectory(prefix="taipan-test-") as folder:
        task = Path(folder) / "task"
        task.write_bytes(pickle.dumps((function.__module__, function.__name__, arguments, join, timeout)))
        port = free_port()
        if env is None and not on_gpu:
            envs = [process_env(rank, processes, port) for rank in range(processes)]
            request = {"envs": envs, "folder": folder, "module": function.__module__, "timeout": timeout}
            codes = the_forks(ROOT).run(**request)
        else:
            running = [start(rank, processes, port, Path(folder), env or {}, on_gpu) for rank in range(processes)]
            codes = wait(running, timeout + 30)
        if any(code != 0 for code in codes):
            raise AssertionError(explain(function.__name__, codes, Path(folder)))
        return [pickle.loads((Path(folder) / f"result{rank}").read_bytes()) for rank in range(processes)]


def run_program(
    processes: int,
    arguments: list[str],
    *,
    timeout: float = 300.0,
    env: dict[str, str] | None = None,
    on_gpu: bool = False,
) -> "Finished":
    """Runs `python ARGUMENTS...` once per rank with torchrun's environment, to the end."""
    with tempfile.TemporaryDirectory(prefix="taipan-test-") as folder:
        port = free_port()
        running = []
        for rank in range(processes):
            with open(Path(folder) / f"stderr{rank}", "wb") as stderr:
                running.append(
                    subprocess.Popen(
                        [sys.executable, *arguments],
                        cwd=ROOT,
                        env=process_env(rank, processes, port, on_gpu) | (env or {}),
                        stdout=stderr,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        codes = wait(running, timeout)
        return Finished(codes, [(Path(folder) / f"stderr{r}").read_text(errors="replace") for r in range(processes)])


@dataclass(frozen=True)
class Finished:
    """What became of a program: exit codes and everything printed, by rank. Code None: killed, the time was up."""

    codes: list[int | None]
    output: list[str]

    def succeeded(self) -> "Finished":
        assert all(code == 0 for code in self.codes), f"exit codes {self.codes}\n" + "\n---\n".join(self.output)
        return self


def start(rank: int, processes: int, port: int, folder: Path, env: dict[str, str], on_gpu: bool) -> subprocess.Popen:
    """One process, with torchrun's environment."""
    with open(folder / f"stderr{rank}", "wb") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.launch", str(folder)],
            cwd=ROOT,
            env=process_env(rank, processes, port, on_gpu) | env,
            stdout=stderr,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def process_env(rank: int, processes: int, port: int, on_gpu: bool = False) -> dict[str, str]:
    """The environment of one rank: torchrun's variables, one thread, the CPU unless on_gpu."""
    device = {"DS_ACCELERATOR": "cuda"} if on_gpu else {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return os.environ | device | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": path,
    }  # fmt: skip


def wait(running: list[subprocess.Popen], timeout: float) -> list[int | None]:
    """Exit codes of all; when one fails the others have ten seconds to follow, then they are killed (None)."""
    end = time.monotonic() + timeout
    while any(p.poll() is None for p in running) and time.monotonic() < end:
        if any(p.poll() not in (None, 0) for p in running):
            end = min(end, time.monotonic() + 10)
        time.sleep(0.05)
    codes = [p.poll() for p in running]
    kill_with_stacks([p.pid for p, code in zip(running, codes, strict=True) if code is None])
    for p in running:
        p.wait()
    return codes


def explain(name: str, codes: list[int | None], folder: Path) -> str:
    """Why a launch failed, the end of every rank's output included."""
    text = [f"{name} on {len(codes)} processes: exit codes {codes} (None: killed, the time was up)"]
    for rank in range(len(codes)):
        text.append(f"--- rank {rank} ---\n" + (folder / f"stderr{rank}").read_text(errors="replace")[-6000:])
    return "\n".join(text)


def main(folder: Path) -> None:
    """The child's side."""
    import faulthandler
    import importlib

    import torch

    from megatron_taipan.parallel.processes import device_of_process, find_place, stop_processes
    from megatron_taipan.train.distributed import start_processes

    module, name, arguments, join, timeout = pickle.loads((folder / "task").read_bytes())
    faulthandler.dump_traceback_later(timeout, exit=True)
    faulthandler.register(signal.SIGQUIT)  # all threads; see forks.py:kill_with_stacks
    torch.set_num_threads(1)
    place = find_place(os.environ)
    if join:
        start_processes(place, device_of_process(place), timeout)
    result = getattr(importlib.import_module(module), name)(*arguments)
    (folder / f"result{place.rank}").write_bytes(pickle.dumps(result))
    if join:
        stop_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # as launch/pretrain.py: past the race between torch's threads and the interpreter's end
