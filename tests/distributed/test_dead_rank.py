"""A rank that dies ends the job, and the launcher names it."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from megatron_taipan.train.distributed import free_port
from tests.distributed.launch import ROOT
from tests.train.test_loop import log
from tests.train.toy import toy_tree, write_data

TIMEOUT = 30  # seconds, parallel.timeout_s


def process_of_rank(rank: int, parent: int) -> int | None:
    """The child of `parent` whose environment says RANK=rank."""
    for child in psutil.Process(parent).children():
        if child.environ().get("RANK") == str(rank):
            return child.pid
    return None


@pytest.mark.slow
def test_killed_rank_ends_the_job_within_the_timeout_and_is_named(tmp_path):
    tree = toy_tree(
        write_data(tmp_path / "data"),
        tmp_path / "run",
        parallel={"zero_stage": 1, "tensor": 2, "timeout_s": TIMEOUT},
        train={"steps": 100_000, "global_batch": 2, "micro_batch": 2, "precision": "fp32", "eval_every": 0},
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    command += ["launch/pretrain.py", "--config", str(tmp_path / "config.yaml")]
    with open(tmp_path / "output", "wb") as output:
        job = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + 180
        while not ((tmp_path / "run" / "log.jsonl").exists() and log(tmp_path / "run")):
            assert job.poll() is None and time.monotonic() < end, (tmp_path / "output").read_text()
            time.sleep(0.1)
        victim = process_of_rank(1, job.pid)
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        assert job.wait(TIMEOUT + 45) != 0  # the launcher itself waits up to 30 s for the others to go
        text = (tmp_path / "output").read_text()
        assert "local_rank: 1" in text and "SIGKILL" in text, text
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
