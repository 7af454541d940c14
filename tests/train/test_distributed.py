"""Finding one's place in the run, and agreeing on errors."""

import io
import re
import socket
from contextlib import redirect_stderr

import pytest
import torch

from megatron_taipan.errors import UserError
from megatron_taipan.parallel.all_ranks import run_on_all_ranks
from megatron_taipan.parallel.processes import Unreachable, device_of_process, find_place, first_host
from megatron_taipan.train.distributed import start_processes
from tests.distributed.launch import launch
from tests.train.runs import runs
from tests.train.toy import toy_tree, write_data

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "h",
    "MASTER_PORT": "5",
}
SRUN = {
    "SLURM_PROCID": "9", "SLURM_STEP_NUM_TASKS": "16", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "4242", "SLURM_NTASKS": "16",
}  # fmt: skip

OMPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


def test_mpirun_of_one_process_or_with_our_variables():
    assert find_place({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}).world_size == 1
    assert find_place(OMPI | TORCHRUN).rank == 3
    assert find_place(SRUN | {"PMI_RANK": "9", "PMI_SIZE": "16"}).rank == 9  # srun --mpi=pmi2


def test_torchrun_and_deepspeed():
    place = find_place(TORCHRUN)
    assert (place.rank, place.world_size, place.local_rank, place.local_size) == (3, 4, 1, 2)
    assert (place.address, place.port) == ("h", 5)
    deepspeed = {k: v for k, v in TORCHRUN.items() if k != "LOCAL_WORLD_SIZE"} | {"LOCAL_SIZE": "2"}
    assert find_place(deepspeed) == place


def test_srun():
    place = find_place(SRUN)
    assert (place.rank, place.world_size, place.local_rank, place.local_size) == (9, 16, 1, 8)
    assert (place.address, place.port) == ("gpu07", 24242)
    assert find_place(SRUN | {"MASTER_ADDR": "head", "MASTER_PORT": "7"}).address == "head"
    # torchrun started by srun: torchrun's variables count
    assert find_place(SRUN | TORCHRUN).rank == 3


def test_steps_restarts_and_neighbouring_jobs_take_different_ports():
    """Below 32768: from there on Linux takes ports for outgoing connections."""
    one = SRUN | {"SLURM_STEP_NODELIST": "gpu07"}
    ports = [
        find_place(one | {"SLURM_JOB_ID": str(j), "SLURM_STEP_ID": str(s), "SLURM_RESTART_COUNT": str(r)}).port
        for j in range(4000, 4040) for s in range(5) for r in range(3)
    ]  # fmt: skip
    assert len(set(ports)) == len(ports)
    assert all(1024 <= port < 32768 for port in ports)


def test_a_task_that_sees_one_gpu_takes_it(monkeypatch):
    """--gpus-per-task, --gpu-bind. Not under torchrun: two processes there would share it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    assert device_of_process(find_place(SRUN)) == torch.device("cuda", 0)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    assert device_of_process(find_place(SRUN)) == torch.device("cuda", 0)
    with pytest.raises(UserError, match="process 1 of this host has no GPU: 1 GPUs are visible"):
        device_of_process(find_place(TORCHRUN))
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1")
    with pytest.raises(UserError, match="process 1 of this host has no GPU"):
        device_of_process(find_place(SRUN))


def meet_where_nobody_is(address: str, port: int) -> tuple[str, str, int]:
    from megatron_taipan.parallel import waiting

    waiting.SAY_EVERY_S = 0.2
    place = find_place({"RANK": "0" if address == "127.0.0.1" else "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0",
                        "MASTER_ADDR": address, "MASTER_PORT": str(port)})  # fmt: skip
    with pytest.raises(Unreachable) as error, redirect_stderr(io.StringIO()) as said:
        start_processes(place, torch.device("cpu"), 2.0)
    return said.getvalue(), str(error.value), error.value.exit_status


def test_processes_that_do_not_meet_say_what_they_wait_for():
    ((said, message, status),) = launch(1, meet_where_nobody_is, "nobody.invalid", 23, join=False)
    assert re.search(r"rank 1 has waited \d s for rank 0 at nobody.invalid:23 \(.* does not know that name: .*\)", said)
    assert "the processes did not meet" in message and status == 69


def test_a_port_that_another_program_has_is_named():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        ((_, message, status),) = launch(1, meet_where_nobody_is, "127.0.0.1", port, join=False)
    assert f"cannot listen on port {port}" in message and "MASTER_PORT" in message and status == 69


def test_a_batch_script_outside_srun_is_one_process():
    batch = {k: v for k, v in SRUN.items() if not k.startswith("SLURM_STEP")}
    assert find_place(batch).world_size == 1
    assert find_place({}).world_size == 1


@pytest.mark.parametrize(
    "nodes, host",
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[003-005,9],login1", "gpu003"),
        ("gpu-a[12,14]-ib,x", "gpu-a12-ib"),
        ("r1c[1-2]", "r1c1"),
        ("r[1-2]n[03-04]", "r1n03"),
        ("a,b[1-2]", "a"),
        ("node.with.dots,b", "node.with.dots"),
    ],
)
def test_first_host(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    "env, words",
    [
        ({"RANK": "0"}, ["WORLD_SIZE"]),
        (TORCHRUN | {"RANK": "x"}, ["RANK", "x"]),
        (TORCHRUN | {"RANK": "4"}, ["rank 4", "4 processes"]),
        (SRUN | {"SLURM_STEP_NODELIST": ""}, ["MASTER_ADDR"]),
        (OMPI, ["OMPI_COMM_WORLD_SIZE=2", "mpirun", "torchrun, deepspeed or srun", "RANK=$OMPI_COMM_WORLD_RANK"]),
        ({"PMI_RANK": "1", "PMI_SIZE": "4"}, ["PMI_SIZE=4", "mpirun"]),
        ({"OMPI_COMM_WORLD_SIZE": "x"}, ["OMPI_COMM_WORLD_SIZE", "not a whole number"]),
    ],
)
def test_broken_environments(env, words):
    with pytest.raises(UserError) as error:
        find_place(env)
    assert all(word in str(error.value) for word in words)


def disagree() -> list[str]:
    import torch.distributed as dist

    rank = dist.get_rank()

    def fails_on(*ranks: int):
        def action() -> int:
            if rank in ranks:
                raise UserError(f"bad on {rank}")
            return rank

        return action

    messages = []
    for ranks in ((), (0, 1), (1,)):
        try:
            messages.append(str(run_on_all_ranks(fails_on(*ranks))))
        except UserError as error:
            messages.append(str(error))
    return messages


def test_an_error_on_one_rank_is_raised_on_all():
    assert launch(2, disagree) == [["0", "bad on 0", "rank 1: bad on 1"], ["1", "bad on 0", "rank 1: bad on 1"]]


def test_the_local_rank_of_an_mpirun_further_out_does_not_matter(tmp_path):
    """DeepSpeed's engine asserts that it is LOCAL_RANK, which a torchrun under mpirun gives its own value."""
    tree = toy_tree(write_data(tmp_path / "data"), tmp_path / "run", train={"steps": 1})
    assert launch(1, runs, [tree], env={"OMPI_COMM_WORLD_LOCAL_RANK": "7", "OMPI_COMM_WORLD_SIZE": "8"}) == [[0]]
