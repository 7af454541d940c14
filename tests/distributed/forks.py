"""One process that has imported everything and forks the processes of every launch of a test session.

An interpreter that imports torch, DeepSpeed and our package takes six seconds of a core, in each process of each
launch; a fork takes none. Only the imports are shared: a forked process has joined no process group, started no thread
and drawn no random number, so it begins in the same untouched state as a fresh one.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # prctl: the signal that a process gets when its parent dies
TO_FOLLOW_S = 10.0  # how long the other processes of a launch have to end when one has failed
STACKS_S = 1.0  # how long they have, when they did not, to write where they are


class Forks:
    """The test's side."""

    def __init__(self, root: Path, env: dict[str, str]):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.forks"], cwd=root, env=env, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def run(self, **request: Any) -> list[int | None]:
        """Exit statuses of the launch's processes, by rank; None: killed, the time was up. See `serve` for a request.

        Raises:
            AssertionError: the process that forks has died.
        """
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BaseException:  # a test's time is up: nobody waits for the answer any more
            self.process.kill()  # and with it, what it has forked
            the_forks.cache_clear()
            raise
        if not answer:
            the_forks.cache_clear()
            raise AssertionError(f"the process that forks died with status {self.process.wait()}")
        return json.loads(answer)


@cache
def the_forks(root: Path) -> Forks:
    """The one of this session, started when it is first needed; it ends when its standard input does."""
    from tests.distributed.launch import process_env

    return Forks(root, process_env(0, 1, 0))


def serve() -> None:
    """Answers requests until there are no more.

    A request is a line of JSON: `envs` (of each rank), `folder` (with the file `task`; outputs and results go there),
    `module` of the function, and `timeout` in seconds.
    """
    import importlib

    import torch

    from megatron_taipan.engine.startup import import_deepspeed

    torch.set_num_threads(1)
    import_deepspeed(torch.device("cpu"))
    importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # DeepSpeed looks there at its first engine
    import torch._dynamo  # making an optimizer imports it

    import megatron_taipan.train.loop  # noqa: F401  # what most launches need

    for line in sys.stdin:
        request = json.loads(line)
        importlib.import_module(request["module"])
        children = []
        for rank, env in enumerate(request["envs"]):
            child = os.fork()
            if child == 0:
                begin(Path(request["folder"]), rank, env)
            children.append(child)
        print(json.dumps(wait_for(children, request["timeout"] + 30)), flush=True)


def begin(folder: Path, rank: int, env: dict[str, str]) -> None:
    """One process of a launch; never returns."""
    from tests.distributed.launch import main

    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        output = os.open(folder / f"stderr{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.clear()
        os.environ.update(env)
        main(folder)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # past the race between torch's threads and the interpreter's end


def wait_for(children: list[int], timeout: float) -> list[int | None]:
    """Exit statuses of all; when one fails the others have ten seconds to follow, then they are killed (None)."""
    end = time.monotonic() + timeout
    codes: dict[int, int | None] = {}
    while len(codes) < len(children):
        child, status = os.waitpid(-1, os.WNOHANG)
        if child:
            codes[child] = os.waitstatus_to_exitcode(status)
            if status:
                end = min(end, time.monotonic() + TO_FOLLOW_S)
        elif time.monotonic() > end:
            left = [c for c in children if c not in codes]
            kill_with_stacks(left)
            for child in left:
                os.waitpid(child, 0)
                codes[child] = None
        else:
            time.sleep(0.01)
    return [codes[child] for child in children]


def kill_with_stacks(leaders: list[int]) -> None:
    """Kills process groups, workers of the data included, after all threads of theirs have written their stacks."""
    for name, pause in ((signal.SIGQUIT, STACKS_S), (signal.SIGKILL, 0)):  # launch.py:main has the first one's handler
        for leader in leaders:
            os.killpg(leader, name)
        time.sleep(pause if leaders else 0)


if __name__ == "__main__":
    serve()
