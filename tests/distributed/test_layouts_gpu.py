"""The real program over NCCL, on two GPUs: a run that changes its layout as it goes on."""

import json

import pytest
import torch
import yaml

from tests.distributed.launch import run_program
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
    for part, (name, layout) in enumerate(LAYOUTS.items()):
        stop = STEPS // len(LAYOUTS) * (part + 1)
        run("moving", 2, layout, stop)
        used = json.loads((tmp_path / f"moving/step_{stop:08d}/metadata.json").read_text())["layout"]
        asked = {option: value for option, value in layout.items() if option != "sequence"}
        assert used["processes"] == 2 and asked.items() <= used.items(), (name, used)
        whole_rows = "every tensor rank has all tokens" in log(tmp_path / "moving", "start")[-1]["text"]
        assert whole_rows == (name == "tensor")
    still, moving = ([record["ce"] for record in log(tmp_path / name)] for name in ("still", "moving"))
    assert len(still) == len(moving) == STEPS and still[-1] < 0.98 * still[0]
    assert all(abs(a - b) < tolerance * b for a, b in zip(moving, still, strict=True)), (moving, still)
