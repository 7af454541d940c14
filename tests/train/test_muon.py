"""Runs with Muon: resumed, laid out for other processes, with groups, and beside checkpoints of AdamW."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from checkpoints import diff, inspector, reshard
from megatron_taipan.checkpoint.weights import open_checkpoint
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.parameters import parameter_table
from tests.distributed.series import Job, launch_series
from tests.engine.exact_muon import is_projection
from tests.train.runs import log, numbers, runs
from tests.train.toy import toy_tree, write_data

LR, DECAY = 2e-3, 0.5
GROUPS = [
    {"match": "layers.0.mixer.in_proj_x", "lr": 3.0, "weight_decay": 0.0},
    {"match": "layers.0.mixer.in_proj_z", "weight_decay": 50.0},
    {"match": "layers.1.mlp.*", "lr": 0.0},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("muon")
    prefix = write_data(folder / "data")

    def tree(
        name: str, load: str | None = None, layout: dict | None = None, optim: dict | None = None, **train
    ) -> dict:
        made = toy_tree(prefix, folder / name, train={"steps": 4} | train, parallel=layout or {})
        made["optim"] |= {"name": "muon", "lr": LR, "min_lr": LR, "weight_decay": DECAY} | (optim or {})
        made["checkpoint"] |= {"save_every": 2} | ({"load": str(folder / load)} if load else {})
        return made

    half = tree("resumed", stop_at=2)
    adamw = tree("adamw", optim={"name": "adamw"}, stop_at=2)
    grouped = {"groups": GROUPS, "warmup_steps": 0, "schedule": "constant"}
    first = [
        tree("one"), half, tree("resumed"), adamw, tree("from adamw", "adamw/step_00000002"),
        tree("to adamw", "one/step_00000002", optim={"name": "adamw"}), tree("groups", optim=grouped, steps=1),
    ]  # fmt: skip
    (results,) = launch_series([Job(1, runs, first)])
    assert results[0][:5] == [0] * 5 and results[0][6:] == [0]
    assert "keeps no second moment of matrices, and adamw needs one" in results[0][5]
    assert reshard.main([str(folder / "one/step_00000002"), str(folder / "laid"), "--tensor", "2"]) == 2
    assert (
        reshard.main([str(folder / "one/step_00000002"), str(folder / "laid"), "--tensor", "2", "--processes", "2"])
        == 0
    )
    two = [
        tree("data", "one/step_00000002"),
        tree("tensor", "one/step_00000002", {"tensor": 2}),
        tree("laid", layout={"tensor": 2}),
    ]
    (results,) = launch_series([Job(2, runs, two)])
    assert results[0] == [0, 0, 0]
    return folder


def weights(run: Path) -> dict[str, torch.Tensor]:
    opened = open_checkpoint(run)
    return {name: opened.load(name) for name in opened.names()}


def test_a_resume_is_bit_equal(place):
    whole, resumed = place / "one", place / "resumed"
    assert numbers(resumed) == numbers(whole)
    one, other = weights(whole), weights(resumed)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("run", ["data", "tensor", "laid"])
def test_other_layouts_go_on_from_it(place, run):
    ours, truth = log(place / run), log(place / "one")[2:]
    assert [record["step"] for record in ours] == [3, 4]
    for record, expected in zip(ours, truth, strict=True):
        assert record["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    one, other = weights(place / "one"), weights(place / run)
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=0.02 * LR, msg=f"{run} {name}")


def test_matrices_have_one_moment_and_tools_know_it(place, capsys):
    path = place / "one/step_00000004"
    with safe_open(path / "state/rank_00000.safetensors", framework="np") as opened:
        keys = list(opened.keys())
    second = {key.partition("|")[0] for key in keys if key.endswith("|exp_avg_sq")}
    names = set(open_checkpoint(path).reader.table)
    assert second == {name for name in names if not is_projection(name)}
    assert {key.partition("|")[0] for key in keys if key.endswith("|exp_avg")} == names
    assert inspector.main([str(path)]) == 0
    assert f"without exp_avg_sq of the {len(names) - len(second)} matrices that Muon steps" in capsys.readouterr().out
    assert diff.main([str(place / "one/step_00000002"), str(place / "laid/step_00000002")]) == 0
    assert "common tensors are bit-equal" in capsys.readouterr().out


def test_a_run_of_adamw_goes_on_with_muon_and_says_so(place):
    assert log(place / "from adamw")[-1]["step"] == 4
    changed = [record["text"] for record in log(place / "from adamw", "changed")]
    assert "differs from the checkpoint's optim.name: adamw, this run muon" in changed


def test_groups_count_for_matrices(place):
    opened = open_checkpoint(place / "groups")
    before = Taipan(opened.network, seed=opened.config.train.seed).state_dict()

    def moved(name: str, decay: float) -> float:
        """Root mean square of the first step, by the learning rate, without the decay."""
        return float((opened.load(name) - before[name] * (1 - LR * decay)).square().mean().sqrt()) / LR

    # 0.2 times the singular values of the orthogonal matrix, which are near 0.9
    assert moved("layers.0.mixer.in_proj_x", 0.0) == pytest.approx(3 * 0.18, rel=0.3)
    assert moved("layers.0.mixer.in_proj_z", 50.0) == pytest.approx(0.18, rel=0.3)
    assert moved("layers.2.mixer.out_proj", DECAY) == pytest.approx(0.18, rel=0.3)
    assert torch.equal(opened.load("layers.1.mlp.up_proj"), before["layers.1.mlp.up_proj"])
    table = parameter_table(opened.network)
    told = [record["text"] for record in log(place / "groups", "optim")]
    assert told[0].startswith(f"Muon: {sum(map(is_projection, table))} matrices with ") and len(told) == 4
