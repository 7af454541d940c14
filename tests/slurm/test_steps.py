"""What the trainer makes of SLURM's variables and commands, in steps of a real SLURM."""

import pytest

from megatron_taipan.parallel.processes import first_host
from tests.slurm.cluster import SEARCH, Cluster
from tests.slurm.conftest import Checkout

PROGRAM = ".venv/bin/python -m tests.slurm.program"


def test_two_steps_of_one_allocation_take_two_ports(slurm: Cluster, checkout: Checkout):
    checkout.real()
    step = f"srun --ntasks=1 --exact {PROGRAM} meet &"
    both = f"{step} first=$!; {step} second=$!; wait $first && wait $second"
    slurm.finish(both, ["--ntasks=2"], cwd=checkout.folder, MASTER_ADDR="127.0.0.1")
    assert checkout.log().count("met\n") == 2


@pytest.mark.parametrize("option", ["--gpus-per-task=1", "--gpus-per-node=2 --gpu-bind=single:1"])
def test_each_task_takes_a_gpu_of_its_own(slurm: Cluster, checkout: Checkout, option: str):
    checkout.real()
    slurm.finish(f"srun {PROGRAM} gpu", ["--ntasks=2", *option.split()], cwd=checkout.folder)
    assert sorted(checkout.log().splitlines()) == ["rank 0 takes 0", "rank 1 takes 1"]


def test_two_tasks_do_not_share_the_only_gpu(slurm: Cluster, checkout: Checkout):
    checkout.real()
    slurm.finish(f"srun {PROGRAM} gpu || true", ["--ntasks=2", "--gpus-per-node=1"], cwd=checkout.folder)
    assert "process 1 of this host has no GPU" in checkout.log()


def test_waiting_for_a_host_that_nobody_knows_is_told(slurm: Cluster, checkout: Checkout):
    checkout.real()
    options = ["--nodes=2", "--ntasks-per-node=1"]
    slurm.finish(f"srun {PROGRAM} wait || true", options, cwd=checkout.folder)
    log = checkout.log()
    assert "rank 1 has waited 1 s for rank 0 at r1n03:" in log and "does not know that name" in log
    assert "error: the processes did not meet" in log and "Exited with exit code 69" in log


@pytest.mark.parametrize("told_by", ["scontrol", "ourselves"])
def test_the_first_host_is_the_one_that_slurm_names(slurm: Cluster, monkeypatch, told_by: str):
    monkeypatch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
    monkeypatch.setenv("PATH", SEARCH if told_by == "scontrol" else "/nowhere")
    for nodes in ("r[1-2]n[03-04]", "gpu[003-005,9],login1", "a,b[1-2]", "r1c[07]", "x[9-11]y[1,3]", "n1"):
        assert first_host(nodes) == slurm.run("scontrol", "show", "hostnames", nodes).split()[0]
