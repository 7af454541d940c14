"""A rank that dies ends the job, and the launcher names it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from megatron_taipan.parallel.processes import free_port
from tests.distributed.launch import ROOT
from tests.train.runs import steps_so_far
from tests.train.toy import toy_tree, write_data

TIMEOUT = 30  # seconds, parallel.timeout_s


def process_of_rank(rank: int, parent: int) -> int | None:
    """The child of `parent` whose environment says RANK=rank."""
    for child in psutil.Process(parent).children():
        if child.environ().get("RANK") == str(rank):
            return child.pid
    return None


class Job:
    """launch/pretrain.py on two processes under torchrun, its output kept in a file."""

    def __init__(self, folder: Path, tree: dict):
        self.config, self.run, self.text = folder / "config.yaml", Path(tree["checkpoint"]["dir"]), folder / "output"
        self.config.write_text(yaml.safe_dump(tree))

    def __enter__(self) -> "Job":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        command += ["--master_port", str(free_port()), "launch/pretrain.py", "--config", str(self.config)]
        with open(self.text, "wb") as output:
            self.process = subprocess.Popen(
                command, cwd=ROOT, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )  # fmt: skip
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)

    def output(self) -> str:
        return self.text.read_text()

    def wait_for_steps(self, steps: int, seconds: float) -> None:
        end = time.monotonic() + seconds
        while steps_so_far(self.run) < steps:
            assert self.process.poll() is None and time.monotonic() < end, self.output()
            time.sleep(0.1)

    def kill_rank(self, rank: int) -> None:
        victim = process_of_rank(rank, self.process.pid)
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        assert self.process.wait(TIMEOUT + 45) != 0  # the launcher itself waits up to 30 s for the others to go
        assert f"local_rank: {rank}" in self.output() and "SIGKILL" in self.output(), self.output()


@pytest.mark.slow
def test_killed_rank_ends_the_job_within_the_timeout_and_is_named(tmp_path):
    tree = toy_tree(
        write_data(tmp_path / "data"),
        tmp_path / "run",
        parallel={"zero_stage": 1, "tensor": 2, "timeout_s": TIMEOUT},
        train={"steps": 100_000, "global_batch": 2, "micro_batch": 2, "precision": "fp32", "eval_every": 0},
    )
    with Job(tmp_path, tree) as job:
        job.wait_for_steps(1, 180)
        job.kill_rank(1)
