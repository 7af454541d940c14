"""The real trainer under the real batch script and a real SLURM, on a tiny network."""

import re
from pathlib import Path

import pytest
import yaml

from tests.distributed.launch import ROOT
from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.conftest import Checkout
from tests.slurm.test_batch_script import JOB
from tests.train.runs import log, steps_so_far
from tests.train.toy import toy_tree, write_data

STEPS = 400  # more than can be done before a signal arrives


def documented_options() -> list[str]:
    """The options of sbatch that the script and the reliability page give for a partition without GPUs."""
    texts = [(ROOT / file).read_text() for file in ("launch/slurm/pretrain.sbatch", "docs/reliability.md")]
    lines = [re.search(r"sbatch (--gpus-per-node=0 .*) launch/slurm/pretrain.sbatch", text).group(1) for text in texts]
    assert lines[0] == lines[1]
    return lines[0].split()


def prepare(checkout: Checkout, steps: int) -> Path:
    """Writes data and config.yaml; returns the run's folder."""
    run = checkout.folder / "run"
    tree = toy_tree(
        write_data(checkout.folder / "data"), run,
        train={"steps": steps, "global_batch": 2, "micro_batch": 1, "precision": "fp32", "eval_every": 0},
    )  # fmt: skip
    (checkout.folder / "config.yaml").write_text(yaml.safe_dump(tree))
    checkout.real()
    return run


def test_two_nodes_without_gpus_stop_come_back_and_finish(slurm: Cluster, checkout: Checkout):
    """SIGUSR1 to the step, as SLURM sends it before the time limit; the second start has fewer steps to go."""
    run = prepare(checkout, STEPS)
    options = ["--nodes=2", *documented_options(), "--ntasks-per-node=1"]
    job = slurm.submit(JOB, options, cwd=checkout.folder, MASTER_ADDR="127.0.0.1")
    wait_for(lambda: steps_so_far(run) >= 3, "three steps", 60, checkout.log)
    slurm.run("scancel", "--signal=USR1", job)
    wait_for(lambda: "back into the queue" in checkout.log(), "the end of the first start", 60, checkout.log)
    stopped = steps_so_far(run)
    config = yaml.safe_load((checkout.folder / "config.yaml").read_text())
    config["train"]["stop_at"] = stopped + 2
    (checkout.folder / "config.yaml").write_text(yaml.safe_dump(config))
    ended = slurm.until(job, "COMPLETED")
    assert ended["Restarts"] == "1" and "Exited with exit code 75" in checkout.log()
    assert [record["step"] for record in log(run)] == list(range(1, stopped + 3))


@pytest.mark.manual
def test_the_time_limit_stops_a_job_that_comes_back(slurm: Cluster, checkout: Checkout):
    """A minute, shorter than the lead: SLURM signals as soon as it looks, every 30 s, so while training or starting."""
    run = prepare(checkout, 1_000_000)
    job = slurm.submit(JOB, [*documented_options(), "--ntasks-per-node=1", "--time=1"], cwd=checkout.folder,
                       MASTER_ADDR="127.0.0.1")  # fmt: skip
    wait_for(lambda: slurm.job(job)["Restarts"] == "2", "two restarts", 300, checkout.log)
    slurm.run("scancel", job)
    slurm.until(job, "CANCELLED")
    assert checkout.log().count("back into the queue") == 2
    steps = [record["step"] for record in log(run)]
    assert steps == list(range(1, len(steps) + 1))
