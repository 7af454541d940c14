"""Faults of runs that torchrun and deepspeed themselves have started; each start costs its imports."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from megatron_taipan.parallel.processes import free_port
from tests.distributed.launch import ROOT
from tests.faults.bench import Bench, CaseRun
from tests.faults.zygote import alive

LAYOUT = "2 data, ZeRO 1"


@dataclass
class Command:
    """A launcher in the background."""

    process: subprocess.Popen
    output: Path

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def ranks(self) -> list[int]:
        """Process numbers of the ranks, at any depth under the launcher."""
        below = psutil.Process(self.process.pid).children(recursive=True)
        return [p.pid for p in below if "launch/pretrain.py" in p.cmdline() and "--config" in p.cmdline()
                and not {"torch.distributed.run", "deepspeed.launcher.launch"} & set(p.cmdline())]  # fmt: skip

    def wait(self, ranks: list[int], timeout: float = 150.0) -> int:
        """Until launcher and ranks are gone; the launcher's status."""
        end = time.monotonic() + timeout
        while self.process.poll() is None or any(alive(pid) for pid in ranks):
            if time.monotonic() > end:
                for pid in ranks:
                    psutil.Process(pid).kill()
                self.process.kill()
                raise AssertionError(f"it did not end within {timeout:.0f} s\n{self.text()[-5000:]}")
            time.sleep(0.1)
        return self.process.returncode


def start_launcher(run: CaseRun, launcher: str) -> Command:
    """The same command as the zygote's, through a launcher."""
    config = run.write_config()
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(free_port())]
    deepspeed = ["-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(free_port())]
    command = [sys.executable, *(torchrun if launcher == "torchrun" else deepspeed)]
    output = run.home / f"{launcher}{time.monotonic_ns()}"
    with open(output, "wb") as file:
        process = subprocess.Popen(
            [*command, "launch/pretrain.py", "--config", str(config)], cwd=ROOT, stdout=file, stderr=file,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"},
            start_new_session=True,
        )  # fmt: skip
    return Command(process, output)


def disturbed(bench: Bench, seed: int, launcher: str, number: int, *, victim: str) -> tuple[CaseRun, int, str]:
    """Starts, waits for a random step, sends a signal, waits for the end; the run is long enough for the signal."""
    bench.reference(LAYOUT)
    run = CaseRun(bench, f"{launcher} {signal.Signals(number).name} {victim}", LAYOUT, seed)
    command = start_launcher(run, launcher)
    wanted = run.rng.randint(1, 5)
    end = time.monotonic() + 180
    while not any(r["step"] >= wanted for r in run.records("step")):
        assert command.process.poll() is None and time.monotonic() < end, command.text()[-5000:]
        time.sleep(0.01)
    ranks = command.ranks()
    assert len(ranks) == 2, f"found {len(ranks)} ranks"
    os.kill(command.process.pid if victim == "launcher" else run.rng.choice(ranks), number)
    status = command.wait(ranks)
    return run, status, command.text()


def saved_where_it_stopped(run: CaseRun) -> None:
    done = max(run.losses())
    assert run.newest() == done, f"step {done} was done and only {run.newest()} is saved"


def torchrun_loses_a_rank(bench: Bench, seed: int) -> None:
    """torchrun: SIGKILL to a rank; torchrun ends the other one."""
    run, status, text = disturbed(bench, seed, "torchrun", signal.SIGKILL, victim="rank")
    assert status != 0 and "SIGKILL" in text, text[-3000:]
    run.continues_the_same()


def torchrun_gets_sigterm(bench: Bench, seed: int) -> None:
    """torchrun: SIGTERM to it; the ranks save the step they are at."""
    run, _, _ = disturbed(bench, seed, "torchrun", signal.SIGTERM, victim="launcher")
    saved_where_it_stopped(run)
    run.continues_the_same()


def torchrun_is_killed(bench: Bench, seed: int) -> None:
    """torchrun: SIGKILL to it; the ranks notice, save and end."""
    run, _, _ = disturbed(bench, seed, "torchrun", signal.SIGKILL, victim="launcher")
    saved_where_it_stopped(run)
    run.continues_the_same()


def deepspeed_gets_sigterm(bench: Bench, seed: int) -> None:
    """deepspeed: SIGTERM to it; the ranks save the step they are at."""
    run, _, _ = disturbed(bench, seed, "deepspeed", signal.SIGTERM, victim="launcher")
    saved_where_it_stopped(run)
    run.continues_the_same()


def deepspeed_is_killed(bench: Bench, seed: int) -> None:
    """deepspeed: SIGKILL to it; the ranks notice, save and end."""
    run, _, _ = disturbed(bench, seed, "deepspeed", signal.SIGKILL, victim="launcher")
    saved_where_it_stopped(run)
    run.continues_the_same()


def deepspeed_returns_75(bench: Bench, seed: int) -> None:
    """deepspeed: SIGTERM to a rank; its own exit status is 75, at which a batch script starts it again."""
    run, status, text = disturbed(bench, seed, "deepspeed", signal.SIGTERM, victim="rank")
    assert status == 75, f"{status}: {text[-3000:]}"
    saved_where_it_stopped(run)
    run.continues_the_same()


CASES = [
    torchrun_loses_a_rank, torchrun_gets_sigterm, torchrun_is_killed, deepspeed_gets_sigterm, deepspeed_is_killed,
    deepspeed_returns_75,
]  # fmt: skip
