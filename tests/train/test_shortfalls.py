"""Schedules that cannot do what they say, told by --dry-run and at the start."""

import re
from collections.abc import Callable

import pytest
import torch

from megatron_taipan import pretrain, versions
from megatron_taipan.config_loading import load_config
from megatron_taipan.errors import UserError
from megatron_taipan.train.dry_run import dry_run
from megatron_taipan.train.shortfalls import shortfalls
from tests.distributed.launch import ROOT
from tests.distributed.launch import launch as start
from tests.train.runs import log, runs
from tests.train.toy import toy_config, toy_tree, write_data

CONFIGS = sorted((ROOT / "launch" / "configs").glob("*.yaml"))


def of_new_run(*overrides: str, name: str = "taipan_190m") -> list[str]:
    config = load_config(ROOT / "launch" / "configs" / f"{name}.yaml", overrides)
    return shortfalls(config, 0, config.train.steps)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_presets_do_what_they_say(path):
    assert of_new_run(name=path.stem) == []


def test_so_do_the_programs_own_examples():
    lines = re.findall(r"--config launch/configs/(\w+)\.yaml((?: [\w.]+=\S+)+)", pretrain.__doc__)
    lines += re.findall(r"launch/configs/([\w.]+)\.yaml((?: [\w.]+=\S+)+)", (ROOT / "README.md").read_text())
    assert len(lines) >= 2
    for name, overrides in lines:
        assert of_new_run(*overrides.split(), name=name) == [], name


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["train.steps=1000"], ["warmup_steps=2000", "train.steps=1000", "ends at 0.00025, 0.5 of its peak", "to 100"]),
        (["train.steps=2000"], ["ends at 0.0005, 1 of its peak"]),
        (["optim.decay_steps=1500"], ["decay_steps=1500", "warmup_steps=2000", "falls from 0.0005", "at once"]),
        (["optim.decay_steps=2000"], ["decay_steps=2000"]),
        (["train.steps=3000", "optim.decay_steps=4000"], ["decay_steps=4000", "ends at 0.000255", "min_lr=1e-05"]),
        (["train.steps=9000", "train.stop_at=9001"], ["train.stop_at=9001"]),
        (["train.steps=5000", "model.gate.capacity={start: 0.5, end: 0.1, after: 6000, until: 7000}"],
         ["model.gate.capacity: after=6000 is step 6000", "stays at 0.5"]),
        (["train.steps=5000", "model.gate.tau={start: 2, end: 1, after: 4000, until: 8000}"],
         ["model.gate.tau: until=8000 is step 8000", "reaches 1.75, not end=1"]),
        (["train.steps=5000", "model.gate.budget_lambda={start: 2, end: 1, after: 0.5, until: 5001}"],
         ["model.gate.budget_lambda: until=5001"]),
    ],
)  # fmt: skip
def test_one_sentence_says_what_falls_short(overrides, words):
    (found,) = of_new_run(*overrides)
    assert all(word in found for word in words), found


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.steps=2001"], ["optim.decay_steps=2001"], ["train.steps=3000", "optim.decay_steps=3000"],
        ["train.steps=5000", "model.gate.tau={start: 2, end: 1, after: 0.5, until: 1.0}"],
        ["train.steps=5000", "model.gate.tau={start: 2, end: 1, after: 4999, until: 5000}"],
        ["train.steps=5000", "train.stop_at=5000"],
    ],
)  # fmt: skip
def test_at_the_border_all_is_reached(overrides):
    assert of_new_run(*overrides) == []


def test_gates_of_a_network_without_any_do_not_matter():
    late = "model.gate.tau={start: 2, end: 1, after: 99990, until: 99999}"
    assert of_new_run(late, "train.steps=9000", name="mamba2_190m") == []


def test_a_schedule_that_ends_before_it_begins_is_refused_before_the_run_too(tmp_path):
    prefix = write_data(tmp_path / "data")
    plan = {"start": 0.5, "end": 0.1, "after": 0.9, "until": 3}  # step 5.4 of 6
    with pytest.raises(UserError, match="is step 3 of a run of 6 steps, before after=0.9, step 5.4"):
        list(dry_run(toy_config(prefix, tmp_path, model={**MODEL, "gate": {"capacity": plan}}), 1))


MODEL = toy_tree("x", "x")["model"]
OLDER = "2.1", "2.9"  # releases tried, as a project has them that this torch is too new for


def runs_under_a_newer_torch(trees: list[dict]) -> list:
    versions.TORCH_OLDEST, versions.TORCH_NEWEST = OLDER
    return runs(trees)


def test_the_dry_run_and_the_start_say_it(tmp_path, monkeypatch):
    """Also of a run that is further than its configuration wants it to go, under a torch that was not tried."""
    prefix = write_data(tmp_path / "data")
    plan = {"start": 0.5, "end": 0.1, "after": 0.0, "until": 1.0}
    sections = {"train": {"steps": 8, "stop_at": 4}, "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 100},
                "model": {**MODEL, "gate": {"capacity": plan}}}  # fmt: skip
    tree = toy_tree(prefix, tmp_path / "run", **sections)

    def said(run: Callable = runs, **train: int) -> tuple[list[str], list[str]]:
        new = tree | {"train": tree["train"] | train}
        lines = dry_run(toy_config(prefix, tmp_path / "run", **sections | {"train": new["train"]}), 1)
        dry = [line.removeprefix("warning    ") for line in lines if line.startswith("warning ")]
        count = len(log(tmp_path / "run", "warning")) if (tmp_path / "run" / "log.jsonl").exists() else 0
        assert start(1, run, [new]) == [[0]]
        return dry, [record["text"] for record in log(tmp_path / "run", "warning")][count:]

    dry, started = said()
    assert dry == started and len(dry) == 1 and "ends at 0.0008, 0.08 of its peak" in dry[0]
    for name, release in zip(("TORCH_OLDEST", "TORCH_NEWEST"), OLDER, strict=True):
        monkeypatch.setattr(versions, name, release)
    dry, started = said(runs_under_a_newer_torch, steps=2, stop_at=2)
    assert dry == started and len(dry) == 5
    assert dry.pop(0).startswith(f"torch {torch.__version__} is newer than what was tried (2.1 to 2.9)")
    assert dry[0] == "train.steps=2 is before step 4, where the checkpoint is: nothing is trained"
    assert "until=1 is step 8, and the run ends at train.steps=2" in dry[3]
