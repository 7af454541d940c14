"""Learning rates and weight decay by pattern of names: what Adam's first step shows, in each layout."""

from pathlib import Path

import pytest
import torch

from megatron_taipan.checkpoint.weights import open_checkpoint
from megatron_taipan.config_errors import ConfigError
from megatron_taipan.config_loading import make_config
from megatron_taipan.engine.build import describe_groups
from megatron_taipan.errors import UserError
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.optim_config import OptimConfig
from megatron_taipan.parameters import parameter_table
from tests.distributed.series import Job, launch_series
from tests.train.runs import log, runs
from tests.train.toy import toy_tree, write_data

LR = 1e-3
LAYOUTS = {"one": (1, {"zero_stage": 1}), "stage0": (2, {"zero_stage": 0}), "stage3": (2, {"zero_stage": 3}),
           "tensor": (2, {"tensor": 2}), "stages": (2, {"pipeline": 2})}  # fmt: skip
GROUPS = [
    {"match": "embedding.*", "lr": 0.25, "weight_decay": 0.0},
    {"match": "layers.*.gate.*", "lr": 0.0},
    {"match": "final_norm.weight", "weight_decay": 100.0},
    {"match": "layers.0.*", "lr": 3.0, "weight_decay": 0.0},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """One step in each layout."""
    folder = tmp_path_factory.mktemp("groups")
    prefix = write_data(folder / "data")
    optim = {"lr": LR, "min_lr": LR, "warmup_steps": 0, "schedule": "constant", "weight_decay": 0.5, "grad_clip": 0.0,
             "eps": 1e-12, "groups": GROUPS}  # fmt: skip

    def tree(name: str, layout: dict) -> dict:
        return toy_tree(prefix, folder / name, train={"steps": 1}, parallel=layout, optim=optim)

    jobs = [Job(size, runs, [tree(name, layout)]) for name, (size, layout) in LAYOUTS.items()]
    assert all(set(results[0]) == {0} for results in launch_series(jobs))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_first_step_is_as_long_as_the_factor_says(place, layout):
    opened = open_checkpoint(place / layout)
    before = Taipan(opened.network, seed=opened.config.train.seed).state_dict()

    def moved(name: str, decay: float) -> float:
        """The longest step of an element, the decay's part added back: Adam's first is the learning rate, or 0."""
        start = before[name].double()
        return float((opened.load(name).double() - start * (1 - decay)).abs().max())

    assert moved("embedding.weight", 0) == pytest.approx(0.25 * LR, rel=1e-3)
    assert torch.equal(opened.load("layers.1.gate.weight"), before["layers.1.gate.weight"])
    assert moved("final_norm.weight", 100 * LR) == pytest.approx(LR, rel=1e-3)
    first = [name for name in before if name.startswith("layers.0.")]
    assert max(moved(name, 0) for name in first) == pytest.approx(3 * LR, rel=1e-3)
    other = next(n for n, spec in parameter_table(opened.network).items() if n.startswith("layers.2.") and spec.decay)
    assert moved(other, 0.5 * LR) == pytest.approx(LR, rel=1e-3)


def test_the_log_says_what_each_group_does(place):
    told = [record["text"] for record in log(place / "one", "optim")]
    assert told[0] == "embedding.*: 1 parameters, learning rate x 0.25, weight decay 0"
    assert len(told) == 4


def test_a_pattern_that_matches_nothing_is_refused_with_names():
    names = parameter_table(make_config(toy_tree("no", "no")).model)
    optim = OptimConfig(groups=[{"match": "layers.*"}, {"match": "layers.0.gate"}])
    with pytest.raises(UserError, match=r"match=layers.0.gate matches no parameter .*embedding.weight"):
        describe_groups(optim, names)


def test_an_unknown_key_of_a_group_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"unknown key 'optim.groups.0.matches'; did you mean optim.groups.0.match"):
        make_config(toy_tree("no", "no", optim={"groups": [{"match": "a", "matches": 1}]}))
