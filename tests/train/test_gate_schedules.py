"""The gate's schedules in a run: what the log shows, what a resume keeps, what it says, and what it refuses."""

from pathlib import Path

import pytest

from megatron_taipan.checkpoint.metadata import read_metadata
from tests.distributed.launch import launch
from tests.train.runs import log, runs, with_options
from tests.train.toy import toy_tree, write_data

GATE = {
    "capacity": {"start": 0.9, "end": 0.1, "after": 0.25, "until": 0.75},
    "tau": {"start": 2.0, "end": 1.0, "until": 4},
    "gradient": "sampled", "gradient_share": {"start": 0.25, "end": 1.0, "until": 0.75}, "budget": "batch",
}  # fmt: skip
CAPACITY = [0.9, 0.9, 0.9, 0.7, 0.5, 0.3, 0.1, 0.1]  # of 8 steps; falls from step 2 to step 6
TAU = [2.0, 1.75, 1.5, 1.25, 1.0, 1.0, 1.0, 1.0]


def with_gate(tree: dict, **gate) -> dict:
    return {**tree, "model": {**tree["model"], "gate": {**GATE, **gate}}}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> tuple[Path, list]:
    """A run of 8 steps cut after 3; then with 20 steps to 6; then with other schedules, and with another network."""
    folder = tmp_path_factory.mktemp("runs")
    prefix = write_data(folder / "data")
    tree = with_gate(toy_tree(prefix, folder / "run", train={
        "steps": 8, "stop_at": 3, "global_batch": 4, "micro_batch": 2, "precision": "fp32", "eval_every": 0,
        "eval_samples": 2,
    }))  # fmt: skip
    longer = with_options(tree, train={"steps": 20, "stop_at": 6})
    other = with_gate(with_options(longer, train={"stop_at": 7}), capacity=0.4, budget="row")
    network = with_gate(other, refinement="add")
    return folder / "run", launch(1, runs, [tree, longer, other, network])[0]


def test_every_step_shows_where_the_schedules_stand(results):
    directory, statuses = results
    assert statuses[:3] == [0, 0, 0]
    steps = log(directory)
    assert [r["gate/capacity"] for r in steps] == pytest.approx([*CAPACITY[:6], 0.4])
    assert [r["gate/tau"] for r in steps] == pytest.approx(TAU[:7])
    assert [r["gate/every_query"] for r in steps] == [0, 0, 1, 1, 0, 1, 1]  # its sum is 1.3, 2, 3.75, 4.75
    assert all(r["gate/budget_lambda"] == 1.0 for r in steps)
    for r in steps[:6]:  # the batch's budget is that of the share over all micro-batches
        assert r["layers.1.budget"] == pytest.approx((r["gate/capacity"] - r["layers.1.selected"]) ** 2, rel=1e-6)
        assert r["loss"] == pytest.approx(r["ce"] + r["budget"])


def test_a_longer_run_keeps_the_steps_and_says_so(results):
    directory, _ = results
    first, second, third = [r["text"] for r in log(directory, "gate")]
    assert first == (
        "capacity 0.9 until step 2, linear to 0.1 at step 6, tau 2 until step 0, linear to 1 at step 4,"
        " gradient_share 0.25 until step 0, linear to 1 at step 6"
    )
    assert second == first + " (fractions of the 8 steps with which the run began)"
    assert "capacity" not in third and third.startswith("tau 2")
    assert read_metadata(directory / "step_00000006")["progress"]["run_steps"] == 8


def test_other_settings_of_training_are_taken_and_said_another_network_is_refused(results):
    directory, statuses = results
    said = [r["text"] for r in log(directory, "changed")]
    assert said[:2] == [
        f"differs from the checkpoint's train.{x}" for x in ("steps: 8, this run 20", "stop_at: 3, this run 6")
    ]
    plan = "{after: 0.25, end: 0.1, shape: linear, start: 0.9, until: 0.75}"
    assert said[2:] == [
        f"differs from the checkpoint's {x}"
        for x in (
            f"model.gate.capacity: {plan}, this run 0.4", "model.gate.budget: batch, this run row",
            "train.stop_at: 6, this run 7",
        )
    ]  # fmt: skip
    warned = [r["text"] for r in log(directory, "jump")]
    assert warned[0].startswith("at step 4 this start takes the learning rate from ")  # the cosine of 20 steps
    assert warned[1:] == ["at step 7 this start takes model.gate.capacity from 0.1 to 0.4, 4 times as high"]
    assert "model.gate.refinement: checkpoint has replace, this run add" in statuses[3]


def nan_at_the_third_step(tree: dict) -> list:
    """Runs like `runs`; the weights of the gate are NaN for step 3 alone. Gives also what the gates were told."""
    import torch

    from megatron_taipan.train import loop

    train_step, told = loop.train_step, []

    def with_nan(engine, batches, *, step, gate, **kwargs):
        told.append(gate.shares)
        weights = [p for n, p in engine.module.named_parameters() if n.endswith("gate.weight")]
        before = [p.detach().clone() for p in weights]
        with torch.no_grad():
            for p in weights if step == 2 else ():
                p.fill_(float("nan"))
        result = train_step(engine, batches, step=step, gate=gate, **kwargs)
        with torch.no_grad():
            for p, value in zip(weights, before, strict=True) if step == 2 else ():
                p.copy_(value)
        return result

    loop.train_step = with_nan
    try:
        return [*runs([tree]), told]
    finally:
        loop.train_step = train_step


def test_a_budget_is_not_steered_by_a_step_of_nan(tmp_path):
    """Where logits are NaN nothing is selected, which would push the gate open at the step after."""
    tree = with_gate(toy_tree(write_data(tmp_path / "data"), tmp_path / "run", train={
        "steps": 5, "global_batch": 4, "micro_batch": 2, "precision": "fp32", "eval_every": 0, "eval_samples": 2,
    }))  # fmt: skip
    status, told = launch(1, nan_at_the_third_step, tree)[0]
    assert status == 0
    steps = log(tmp_path / "run")
    assert [r["skipped"] for r in steps] == [0, 0, 1, 0, 0] and steps[2]["layers.1.selected"] == 0
    measured = [[r["layers.1.selected"]] for r in steps]
    assert told == [[0.9], measured[0], measured[1], measured[1], measured[3]]


def test_a_network_without_gates_says_nothing_of_their_schedules_and_one_with_refuses_disorder(tmp_path):
    options = {"steps": 4, "global_batch": 4, "micro_batch": 2, "precision": "fp32", "eval_every": 0, "eval_samples": 2}
    tree = with_gate(toy_tree(write_data(tmp_path / "data"), tmp_path / "run", train=options))
    gateless = {**tree, "model": {**tree["model"], "pattern": "M W"}}
    disorder = with_gate(
        with_options(tree, checkpoint={"dir": str(tmp_path / "other")}),
        tau={"start": 2.0, "end": 1.0, "after": 3, "until": 0.5},
    )
    status, message = launch(1, runs, [gateless, disorder])[0]
    assert status == 0 and log(tmp_path / "run", "gate") == []
    assert "model.gate.tau: until=0.5 is step 2 of a run of 4 steps, before after=3, step 3" in message


@pytest.mark.parametrize("budget", ["batch", "layers"])
def test_a_network_without_gates_trains_with_any_budget(tmp_path, budget):
    """A baseline is the same configuration with another pattern."""
    model = {"pattern": "M W", "gate": {"budget": budget}}
    train = {"steps": 1, "global_batch": 2, "eval_samples": 2}
    tree = toy_tree(write_data(tmp_path / "data"), tmp_path / "run", model=model, train=train)
    assert launch(1, runs, [tree])[0] == [0]
    (step,) = log(tmp_path / "run")
    assert step["loss"] == step["ce"] and step["budget"] == 0
    assert log(tmp_path / "run", "valid")
