"""A model that selects far less or more than it was trained to says so, layer by layer."""

import pytest
import torch

from megatron_taipan.inference.generation import generate
from megatron_taipan.inference.selection_watch import FEWEST, SelectionWatch, far_from_training, watched_selection
from tests.inference.networks import small_config, small_model

PROMPT = torch.randint(61, (1, FEWEST), generator=torch.Generator().manual_seed(0))


def thresholds(model, *values: float) -> None:
    for layer, value in zip((1, 3), values, strict=True):
        model.layers[layer].gate.threshold.fill_(value)


def test_shares_are_those_of_the_networks_own_metrics():
    model = small_model("M S M S")
    watch = SelectionWatch(model)
    out = model(PROMPT)
    own = model.layer_metrics.of_gates(model.named_metrics(out), "selected")
    assert list(watch.shares()) == ["layers.1", "layers.3"]
    assert list(watch.shares().values()) == pytest.approx([share.item() for share in own], abs=1e-6)
    model(PROMPT.flip(1))  # both passes count
    assert 0 < watch.shares()["layers.1"] < 1 and watch.seen["layers.1"][0][1] == 2 * FEWEST
    watch.stop()
    model(PROMPT)
    assert watch.seen["layers.1"][0][1] == 2 * FEWEST


def test_generation_warns_of_the_layer_that_selects_nothing(capsys):
    model = small_model("M S M S", gate={"capacity": 0.3})
    thresholds(model, 1e9, -1e9)  # none, and all: not more than four times 0.3 of the tokens
    with watched_selection(model, "runs/a"):
        generate(model, [PROMPT[0].tolist()], max_new_tokens=1, prefill_chunk=64)
    said = capsys.readouterr().err
    assert said.startswith("warning: runs/a: layers.1 selects 0.00% of the tokens, where training asked for 30%; ")
    assert "evaluation calibrate CHECKPOINT" in said and "layers.3" not in said


def test_four_times_and_a_quarter_are_the_limits():
    config = small_config("M S M S", gate={"capacity": 0.2})
    assert far_from_training(config, {"layers.1": 0.05, "layers.3": 0.8}) is None
    assert "layers.1 selects 4.90%" in far_from_training(config, {"layers.1": 0.049, "layers.3": 0.3})
    assert "layers.3 selects 81.00%" in far_from_training(config, {"layers.1": 0.2, "layers.3": 0.81})


def test_what_the_schedule_ends_at_counts_and_layers_with_one_budget_count_together():
    schedule = {"capacity": {"start": 0.9, "end": 0.2}}
    assert far_from_training(small_config("M S", gate=schedule), {"layers.1": 0.04})
    assert far_from_training(small_config("M S", gate=schedule), {"layers.1": 0.5}) is None
    one = small_config("M S M S", gate={"capacity": 0.2, "budget": "layers"})
    assert far_from_training(one, {"layers.1": 0.0, "layers.3": 0.4}) is None
    assert "the layers' mean selects 1.00%" in far_from_training(one, {"layers.1": 0.0, "layers.3": 0.02})


def test_few_tokens_and_random_gates_say_nothing(capsys):
    model = small_model("M S M S")
    thresholds(model, 1e9, 1e9)
    with watched_selection(model, "m"):
        model(PROMPT[:, : FEWEST - 1])
    with watched_selection(small_model("M W"), "m"):
        pass
    assert capsys.readouterr().err == ""
    assert far_from_training(small_config("M S", gate={"noise": "random"}), {"layers.1": 0.0}) is None


def test_an_error_inside_is_not_buried_under_a_warning(capsys):
    model = small_model("M S M S")
    thresholds(model, 1e9, 1e9)
    with pytest.raises(RuntimeError, match="mine"), watched_selection(model, "m"):
        model(PROMPT)
        raise RuntimeError("mine")
    assert capsys.readouterr().err == ""
