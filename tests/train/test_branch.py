"""Several finished models from one stable run: a branch with a decay of its own, in a folder of its own."""

import pytest

from tests.distributed.launch import launch
from tests.train.runs import log, numbers, runs, with_options
from tests.train.toy import toy_tree, write_data

STABLE = {"schedule": "wsd", "wsd_decay": "linear", "wsd_decay_steps": 2, "warmup_steps": 1, "lr": 1e-2, "min_lr": 0.0}


def test_a_branch_equals_the_run_that_was_that_long_from_the_start(tmp_path):
    prefix = write_data(tmp_path / "data")
    train = {"global_batch": 4, "steps": 8}
    tree = toy_tree(prefix, tmp_path / "stable", train=train, optim=STABLE, checkpoint={"save_every": 1})
    tree["checkpoint"]["dir"] = str(tmp_path / "stable")
    whole = with_options(tree, train={"steps": 5}, checkpoint={"dir": str(tmp_path / "whole")})
    branch = with_options(
        tree,
        train={"steps": 5},
        checkpoint={"dir": str(tmp_path / "branch"), "load": str(tmp_path / "stable/step_00000003")},
    )
    assert launch(1, runs, [tree, whole, branch])[0] == [0, 0, 0]
    assert [record["lr"] for record in log(tmp_path / "stable")][2:] == pytest.approx([1e-2] * 4 + [5e-3, 0])
    assert [record["lr"] for record in log(tmp_path / "branch")] == pytest.approx([5e-3, 0])
    assert numbers(tmp_path / "branch") == numbers(tmp_path / "whole")[3:]  # moments and order of samples were kept
    told = "\n".join(record["text"] for record in log(tmp_path / "branch", "note") if "text" in record)
    assert log(tmp_path / "branch", "start")[0]["step"] == 3, told
