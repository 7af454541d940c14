"""What needs two GPUs: the real program over NCCL, in several layouts, and when a rank dies."""

import pytest
import torch
import yaml

from tests.distributed.launch import run_program
from tests.distributed.test_dead_rank import TIMEOUT, Job
from tests.train.runs import log
from tests.train.toy import toy_tree, write_data

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
LAYOUTS = {
    "tensor": {"tensor": 2, "sequence": False}, "sequence": {"tensor": 2}, "data": {"tensor": 1},
    "zero3": {"tensor": 1, "zero_stage": 3}, "context": {"context": 2},
}  # fmt: skip
STEPS = 2 * len(LAYOUTS)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 0.02)])
def test_saved_in_one_layout_and_resumed_in_others(tmp_path, precision, tolerance):
    """One run that changes its layout every other step, and one that never does, on one GPU."""
    prefix = write_data(tmp_path / "data")

    def run(name: str, processes: int, layout: dict, stop_at: int) -> None:
        train = {"precision": precision, "steps": STEPS, "stop_at": stop_at}
        tree = toy_tree(prefix, tmp_path / name, parallel=layout, train=train)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
        program = ["launch/pretrain.py", "--config", str(tmp_path / "config.yaml")]
        run_program(processes, program, on_gpu=True).succeeded()

    run("still", 1, {}, STEPS)
    for part, layout in enumerate(LAYOUTS.values()):
        run("moving", 2, layout, STEPS // len(LAYOUTS) * (part + 1))
    still, moving = ([record["ce"] for record in log(tmp_path / name)] for name in ("still", "moving"))
    assert len(still) == len(moving) == STEPS and still[-1] < 0.98 * still[0]
    assert all(abs(a - b) < tolerance * b for a, b in zip(moving, still, strict=True)), (moving, still)


@pytest.mark.parametrize("layout", ["sequence", "data", "context"])
def test_killed_rank_ends_the_job_and_the_same_command_goes_on(tmp_path, layout):
    prefix = write_data(tmp_path / "data")
    tree = toy_tree(
        prefix, tmp_path / "run", parallel={"timeout_s": TIMEOUT, **LAYOUTS[layout]},
        train={"steps": 100_000, "precision": "bf16"}, checkpoint={"save_every": 5},
    )  # fmt: skip
    with Job(tmp_path, tree) as job:
        job.wait_for_steps(12, 240)
        job.kill_rank(1)
    with Job(tmp_path, tree) as job:
        job.wait_for_steps(40, 240)
    starts = [record["step"] for record in log(tmp_path / "run", "start")]
    assert starts[0] == 0 and starts[1] >= 5 and starts[1] % 5 == 0
