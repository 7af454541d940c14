"""Finding one's place in the run, and agreeing on errors."""

import pytest

from megatron_taipan.errors import UserError
from megatron_taipan.train.distributed import agree, find_place, first_host
from tests.distributed.launch import launch

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
            messages.append(str(agree(fails_on(*ranks))))
        except UserError as error:
            messages.append(str(error))
    return messages


def test_an_error_on_one_rank_is_raised_on_all():
    assert launch(2, disagree) == [["0", "bad on 0", "rank 1: bad on 1"], ["1", "bad on 0", "rank 1: bad on 1"]]
