"""One process that has imported everything and forks training runs: a run then starts in half a second, not in eight.

    zygote = Zygote()
    job = zygote.start(config_file, folder, ranks=2)      # a launcher process, and under it the ranks
    job.wait()                                            # the launcher's exit status
    zygote.close()

Only the interpreter's start and the imports are saved. A rank runs `megatron_taipan.pretrain.main` in a separate
process with torchrun's environment; gloo, DeepSpeed and the network are set up after the fork. The launcher behaves as
torchrun does: it passes SIGTERM on, and when a rank fails it ends the others, killing those that do not end by
themselves.
"""

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.distributed.launch import ROOT, process_env

PR_SET_CHILD_SUBREAPER = 36
GRACE_S = 20.0  # between SIGTERM and SIGKILL to the ranks that outlive another


class Zygote:
    """The process that forks; used from the process that runs the cases."""

    def __init__(self) -> None:
        env = process_env(0, 1, 0)
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del env[name]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.zygote"], cwd=ROOT, env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._answer()

    def start(
        self, config: Path, folder: Path, *, ranks: int = 2, inside: dict[str, Any] | None = None
    ) -> "TrainingJob":
        """Starts the training program.

        Args:
            folder: where the ranks' outputs and process numbers are written; made if need be.
            inside: a fault that a rank prepares for itself, see tests/faults/rank.py.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pids").unlink(missing_ok=True)
        task = {"config": str(config), "folder": str(folder), "ranks": ranks, "inside": inside}
        pid = self.ask(start=task)
        end = time.monotonic() + 20
        while not (folder / "pids").exists() and time.monotonic() < end:
            time.sleep(0.002)
        return TrainingJob(self, pid, json.loads((folder / "pids").read_text()), folder)

    def ask(self, **request: Any) -> Any:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        assert line, "the zygote died"
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(20)


@dataclass
class TrainingJob:
    """One start of the training program."""

    zygote: Zygote
    launcher: int  # process numbers
    ranks: list[int]
    folder: Path
    statuses: dict[int, int] = field(default_factory=dict)

    def status(self, pid: int) -> int | None:
        """A process' exit status, negative for a signal; None while it runs."""
        if pid not in self.statuses:
            found = self.zygote.ask(poll=pid)
            if found is None and not alive(pid):
                found = self.zygote.ask(poll=pid)
                found = -1 if found is None else found  # reaped by its launcher, which alone knows the status
            if found is not None:
                self.statuses[pid] = found
        return self.statuses.get(pid)

    def wait(self, timeout: float = 90.0) -> int:
        """Until the launcher and all ranks are gone; the launcher's status.

        Raises:
            AssertionError: the time is up; everything is killed, and the outputs are in the message.
        """
        end = time.monotonic() + timeout
        while any(self.status(pid) is None for pid in (self.launcher, *self.ranks)):
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"it did not end within {timeout:.0f} s\n{self.output()}")
            time.sleep(0.02)
        return self.statuses[self.launcher]

    def running(self) -> bool:
        return any(self.status(pid) is None for pid in (self.launcher, *self.ranks))

    def kill(self) -> None:
        """Ends all processes of this job at once."""
        for pid in (self.launcher, *self.ranks):
            send(pid, signal.SIGKILL)

    def pause(self) -> None:
        """Stops all processes of this job, until `go_on`."""
        for pid in (self.launcher, *self.ranks):
            send(pid, signal.SIGSTOP)

    def go_on(self) -> None:
        for pid in (*self.ranks, self.launcher):
            send(pid, signal.SIGCONT)

    def outputs(self) -> list[str]:
        """What each rank printed."""
        return [(self.folder / f"output{n}").read_text(errors="replace") for n in range(len(self.ranks))]

    def output(self) -> str:
        """The end of what all of them printed."""
        files = sorted(self.folder.glob("output*"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-4000:]}" for file in files)


def send(pid: int, number: int) -> None:
    """A signal to a process that may be gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def alive(pid: int) -> bool:
    """Whether a process runs (one that only waits to be reaped does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


# ---- the zygote's side ----


def serve() -> None:
    """Answers requests until its input ends, then kills what still runs."""
    from tests.faults import rank  # noqa: F401  # everything that is slow to import

    # ranks whose launcher was killed become children of this process, so that they are reaped
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    statuses: dict[int, int] = {}
    launchers: set[int] = set()
    print("true", flush=True)
    while True:
        ready, _, _ = select.select([sys.stdin], [], [], 0.1)
        reap_children(statuses)
        if not ready:
            continue
        line = sys.stdin.readline()
        if not line:
            break
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                as_launcher(request["start"])
            launchers.add(pid)
            print(pid, flush=True)
        else:
            print(json.dumps(statuses.get(request["poll"])), flush=True)
    for pid in launchers - statuses.keys():
        send(pid, signal.SIGKILL)


def reap_children(statuses: dict[int, int]) -> None:
    """Records the exit status of every child that has ended."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        statuses[pid] = os.waitstatus_to_exitcode(status)


def as_launcher(task: dict[str, Any]) -> None:
    """Forks the ranks, watches them, and never returns."""
    from megatron_taipan.parallel.processes import free_port
    from tests.faults.rank import run_rank

    os.setsid()
    detach_streams(Path(task["folder"]) / "output-launcher")
    port, pids = free_port(), []
    for number in range(task["ranks"]):
        pid = os.fork()
        if pid == 0:
            detach_streams(Path(task["folder"]) / f"output{number}")
            run_rank(task, number, port)
        pids.append(pid)
    passed_on: list[int] = []

    def pass_on(number: int, _: Any) -> None:
        passed_on.append(number)
        for pid in pids:
            send(pid, number)

    signal.signal(signal.SIGTERM, pass_on)
    temporary = Path(task["folder"]) / "pids.tmp"
    temporary.write_text(json.dumps(pids))
    os.replace(temporary, temporary.with_suffix(""))

    first_failure, deadline = 0, float("inf")
    statuses: dict[int, int] = {}
    while len(statuses) < len(pids):
        known = len(statuses)
        reap_children(statuses)
        failed = [code for code in statuses.values() if code]
        if failed and not first_failure:
            first_failure, deadline = failed[0], time.monotonic() + GRACE_S
            for pid in pids:
                send(pid, signal.SIGTERM)
        if time.monotonic() > deadline:
            for pid in set(pids) - statuses.keys():
                send(pid, signal.SIGKILL)
        if len(statuses) == known:
            time.sleep(0.01)
    os._exit(first_failure if first_failure >= 0 else 128 - first_failure)


def detach_streams(output: Path) -> None:
    """Sends what this process prints to a file, added to its end, and gives it no input."""
    handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(handle)
    os.close(null)


if __name__ == "__main__":
    serve()
