"""launch/slurm/pretrain.sbatch under SLURM itself, with a stand-in for the trainer where training is not the point."""

import pytest

from tests.distributed.launch import ROOT
from tests.slurm.cluster import Cluster
from tests.slurm.conftest import Checkout

SCRIPT = ROOT / "launch/slurm/pretrain.sbatch"
JOB = (SCRIPT, "config.yaml")
# what docs/reliability.md says of a partition without GPUs
CPU = ["--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1"]
TRAINS = "trap 'sleep 1; exit 75' TERM USR1\nsleep 60 & wait\n"  # as the trainer does: finishes the step, saves
STARTS = "exec sleep 60\n"  # dies of the signal


@pytest.mark.parametrize("trainer", [TRAINS, STARTS], ids=["training", "starting"])
def test_scancel_ends_a_job_for_good(slurm: Cluster, checkout: Checkout, trainer: str):
    checkout.stand_in(trainer)
    job = slurm.submit(JOB, ["--nodes=2", *CPU], cwd=checkout.folder)
    checkout.until_started(2)
    slurm.run("scancel", job)
    assert slurm.until(job, "CANCELLED", timeout=20)["Restarts"] == "0"
    assert "cancelled, so not again" in checkout.log()


@pytest.mark.parametrize(
    "partition, trainer", [("grace", TRAINS), ("grace", STARTS), ("cancel", TRAINS), ("requeue", TRAINS)],
    ids=["grace-training", "grace-starting", "cancel", "requeue"],
)  # fmt: skip
def test_a_preempted_job_comes_back(slurm: Cluster, checkout: Checkout, partition: str, trainer: str):
    """SIGTERM and time to save; SIGTERM and the end; the same with SLURM itself putting the job back."""
    checkout.stand_in(f"[ ${{SLURM_RESTART_COUNT:-0}} = 1 ] && exit 0\n{trainer}")
    job = slurm.submit(JOB, [f"--partition={partition}", "--nodes=2", *CPU], cwd=checkout.folder)
    checkout.until_started(2)
    slurm.submit(["--wrap=true"], ["--partition=urgent", "--nodes=2", "--exclusive"], cwd=checkout.folder)
    assert slurm.until(job, "COMPLETED")["Restarts"] == "1"
    assert len(checkout.starts()) == 4


def test_export_none_leaves_the_tasks_their_environment(slurm: Cluster, checkout: Checkout):
    """srun obeys SLURM_EXPORT_ENV, which sbatch sets: the tasks had no PATH with python."""
    checkout.stand_in("exit 0\n")
    job = slurm.submit(JOB, ["--export=NONE", *CPU], cwd=checkout.folder)
    slurm.until(job, "COMPLETED", timeout=20)
    assert checkout.starts() == ["rank 0 of 1, restart 0: -u launch/pretrain.py --config config.yaml"]


def test_user_need_not_be_set(slurm: Cluster, checkout: Checkout):
    checkout.stand_in("exit 0\n")
    job = slurm.submit(JOB, CPU, cwd=checkout.folder, USER=None, LOGNAME=None)
    slurm.until(job, "COMPLETED", timeout=20)


def test_no_environment_is_wrong_input(slurm: Cluster, checkout: Checkout):
    job = slurm.submit(JOB, CPU, cwd=checkout.folder)
    ended = slurm.until(job, "FAILED", timeout=20)
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0")
    assert "VENV=.venv" in checkout.log()


@pytest.mark.parametrize(
    "text", ["[ $SLURM_PROCID = 0 ] && sleep 1 && exit 2\nexec sleep 60\n", None], ids=["input", "import"]
)
def test_what_would_be_wrong_again_ends_the_job(slurm: Cluster, checkout: Checkout, text: str | None):
    """Two tasks: the first to end has srun end the other by SIGTERM, and srun's status is the highest, 143.

    The stand-in lives for a second first: a signal to a task that is not there yet is lost, and srun waits (--wait).
    """
    if text is None:
        checkout.real("-S")  # without site-packages
    else:
        checkout.stand_in(text)
    job = slurm.submit(JOB, ["--nodes=2", *CPU], cwd=checkout.folder)
    ended = slurm.until(job, "FAILED", timeout=30)
    assert (ended["ExitCode"], ended["Restarts"]) == ("2:0", "0"), checkout.log()


def test_of_a_job_array_only_the_signalled_task_comes_back(slurm: Cluster, checkout: Checkout):
    """The array's number is also the number of one of its tasks."""
    checkout.stand_in(f"[ ${{SLURM_RESTART_COUNT:-0}} = 1 ] && exec sleep 60\n{TRAINS}")
    array = slurm.submit(JOB, ["--array=0-1", "--nodes=1", "--ntasks-per-node=1", *CPU], cwd=checkout.folder)
    checkout.until_started(2)
    jobs = {task: slurm.job(f"{array}_{task}")["JobId"] for task in "01"}
    (signalled,) = (task for task in "01" if jobs[task] == array)
    slurm.run("scancel", "--signal=USR1", f"{array}_{signalled}")
    checkout.until_started(3)
    restarts = {task: slurm.job(f"{array}_{task}")["Restarts"] for task in "01"}
    slurm.run("scancel", array)
    assert restarts == {task: "1" if task == signalled else "0" for task in "01"}


def test_restarts_without_a_new_checkpoint_end(slurm: Cluster, checkout: Checkout):
    """As when the time limit is shorter than the lead of the signal: 75 again and again."""
    checkout.stand_in("exit 75\n")
    job = slurm.submit(JOB, CPU, cwd=checkout.folder, MAX_RESTARTS="1")
    ended = slurm.until(job, "FAILED")
    assert (ended["ExitCode"], ended["Restarts"]) == ("75:0", "1")
    assert len(checkout.starts()) == 2 and "no new checkpoint" in checkout.log()
