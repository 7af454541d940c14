"""Saves of the weights alone: at their own cadence, for everything but a run that resumes."""

from pathlib import Path

import pytest
import torch

from checkpoints import inspector, reshard, verify
from megatron_taipan.checkpoint.folder import WEIGHTS, checkpoints, find_newest
from megatron_taipan.checkpoint.weights import open_checkpoint
from megatron_taipan.config_loading import make_config
from megatron_taipan.errors import UserError
from megatron_taipan.inference.loading import load_model
from megatron_taipan.train.dry_run import dry_run
from tests.checkpoints.made import read_all
from tests.distributed.series import Job, launch_series
from tests.train.runs import log, runs, with_options
from tests.train.toy import toy_tree, write_data


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """run: 7 steps, weights every 2 (the newest two kept), everything every 4. Then: from it, new runs."""
    folder = tmp_path_factory.mktemp("weights")
    train = {"steps": 7, "eval_samples": 4}
    tree = toy_tree(write_data(folder / "data"), folder / "run", train=train, parallel={"tensor": 2})
    tree["checkpoint"] |= {"save_every": 4, "save_weights_every": 2, "keep_last_weights": 2}
    by_load = with_options(
        tree, checkpoint={"dir": str(folder / "by_load"), "load": str(folder / "run/weights_00000006")}
    )
    by_init = with_options(
        tree, checkpoint={"dir": str(folder / "by_init"), "init": str(folder / "run/weights_00000006")},
        parallel={"tensor": 1, "zero_stage": 3}, train={"steps": 1},
    )  # fmt: skip
    by_stages = with_options(
        by_init, checkpoint={"dir": str(folder / "by_stages")}, parallel={"pipeline": 2, "zero_stage": 1},
        model={"gate": {"refinement": "add"}},
    )  # fmt: skip
    alone = with_options(tree, train={"steps": 2, "stop_at": 2}, checkpoint={"dir": str(folder / "alone")})
    results = launch_series([Job(2, runs, [tree, by_load, by_init, alone, by_stages])])[0][0]
    assert [results[0], *results[2:]] == [0, 0, 0, 0]
    (folder / "refusal").write_text(results[1])
    return folder


def test_each_cadence_keeps_its_own(place):
    assert [path.name for path in checkpoints(place / "run")] == ["step_00000004", "step_00000007"]
    assert [path.name for path in checkpoints(place / "run", WEIGHTS)] == ["weights_00000004", "weights_00000006"]
    assert [(r["step"], Path(r["path"]).name[:4]) for r in log(place / "run", "save")] == [
        (2, "weig"), (4, "step"), (4, "weig"), (6, "weig"), (7, "step"),
    ]  # fmt: skip
    assert (place / "run" / "latest").read_text() == "step_00000007\n"


def test_they_hold_the_same_weights_in_a_third_of_the_size(place):
    full, weights = place / "run" / "step_00000004", place / "run" / "weights_00000004"
    ours, theirs = read_all(weights), read_all(full)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert open_checkpoint(weights).step == 4 and not open_checkpoint(weights).moments
    size = [sum(file.stat().st_size for file in path.glob("state/*.safetensors")) for path in (weights, full)]
    assert size[0] < 0.4 * size[1]


def test_a_resume_never_takes_them(place):
    assert find_newest(place / "run").path.name == "step_00000007"
    assert "holds weights only" in (place / "refusal").read_text()
    assert not (place / "by_load").exists()  # a refused run writes nothing, not even its lock
    tree = toy_tree(str(place / "data"), place / "new")
    for load, said in ((place / "run/weights_00000006", "holds weights only"), (place / "none", "holds no complete")):
        tree["checkpoint"]["load"] = str(load)  # a dry run says so too
        with pytest.raises(UserError, match=said):
            list(dry_run(make_config(tree), 1))
    assert [path.name for path in checkpoints(place / "alone")] == ["step_00000002"]


def test_a_new_run_starts_from_them_in_another_layout(place):
    (first, *_) = log(place / "by_init", "valid")
    trained = log(place / "run")[6]["ce"]
    untrained = log(place / "run", "valid")[0]["ce"]
    assert log(place / "by_init", "start")[0]["step"] == 0
    assert abs(first["ce"] - trained) < abs(untrained - trained) / 2
    (staged, *_) = log(place / "by_stages", "valid")
    assert abs(staged["ce"] - trained) < abs(untrained - trained) / 2
    (said,) = log(place / "by_stages", "init")
    assert said["text"].endswith(" computed differently: model.gate.refinement: replace, this run add")
    assert not log(place / "by_init", "init")


def test_every_program_reads_them(place, tmp_path, capsys):
    weights = place / "run" / "weights_00000006"
    assert inspector.main([str(place / "run")]) == 0
    assert inspector.main([str(weights)]) == 0
    out = capsys.readouterr().out
    assert "weights_00000006  complete" in out and "weights only" in out
    assert verify.main([str(place / "run")]) == 0
    assert capsys.readouterr().out.count("good (") == 4
    assert reshard.main([str(weights), str(tmp_path), "--tensor", "1", "--processes", "1"]) == 0
    for path in (weights, tmp_path / "weights_00000006"):
        model, _, config = load_model(path)
        assert config.train.steps == 7
        assert torch.equal(model.final_norm.weight, read_all(weights)["final_norm.weight"])
