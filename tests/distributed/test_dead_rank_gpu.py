"""The real program over NCCL, on two GPUs, when a rank dies."""

import pytest
import torch

from tests.distributed.test_dead_rank import TIMEOUT, Job
from tests.train.runs import log
from tests.train.toy import toy_tree, write_data

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]


@pytest.mark.parametrize("layout", [{"tensor": 2}, {"tensor": 1}, {"context": 2}], ids=["sequence", "data", "context"])
def test_killed_rank_ends_the_job_and_the_same_command_goes_on(tmp_path, layout):
    prefix = write_data(tmp_path / "data")
    tree = toy_tree(
        prefix, tmp_path / "run", parallel={"timeout_s": TIMEOUT, **layout},
        train={"steps": 100_000, "precision": "bf16"}, checkpoint={"save_every": 5},
    )  # fmt: skip
    with Job(tmp_path, tree) as job:
        job.wait_for_steps(12, 240)
        job.kill_rank(1)
    with Job(tmp_path, tree) as job:
        job.wait_for_steps(40, 240)
    starts = [record["step"] for record in log(tmp_path / "run", "start")]
    assert starts[0] == 0 and starts[1] >= 5 and starts[1] % 5 == 0
