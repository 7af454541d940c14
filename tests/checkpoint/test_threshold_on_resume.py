"""Gates' thresholds on a resume: the checkpoint's, which may be calibrated ones, unless the option was changed."""

import torch

from megatron_taipan.checkpoint.weights import open_checkpoint
from megatron_taipan.model.taipan import Taipan
from tests.checkpoints.made import write_weights
from tests.distributed.launch import launch
from tests.train.runs import log, runs
from tests.train.toy import toy_config, toy_tree, write_data

NAME = "layers.1.gate.threshold"


def test_a_changed_threshold_is_taken_and_a_calibrated_one_kept(tmp_path):
    """Below every margin, so that each token is selected; the weights that the run begins with have another, 0.25."""
    prefix, directory = write_data(tmp_path / "data"), tmp_path / "run"
    model = Taipan(toy_config(prefix).model, seed=1)
    model.get_buffer(NAME).fill_(0.25)
    write_weights(tmp_path / "weights", model)
    checkpoint = {"dir": str(directory), "save_every": 1, "keep_last": None, "init": str(tmp_path / "weights")}
    trees = []
    for steps, gate in ((1, {}), (2, {}), (3, {"threshold": -1e4}), (4, {"threshold": -1e4})):
        tree = toy_tree(
            prefix, directory, train={"steps": steps, "eval_every": 1, "eval_samples": 2}, checkpoint=checkpoint
        )
        tree["model"]["gate"] = gate
        trees.append(tree)
    assert launch(1, runs, trees)[0] == [0] * 4
    kept = [open_checkpoint(directory / f"step_{step:08d}").load(NAME) for step in range(1, 5)]
    assert torch.equal(torch.stack(kept), torch.tensor([0.25, 0.25, -1e4, -1e4]))
    selected = {record["step"]: record["layers.1.selected_eval"] for record in log(directory, "valid")}
    assert selected[2] < 1 and selected[3] == selected[4] == 1
