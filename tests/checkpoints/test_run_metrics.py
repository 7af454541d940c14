"""The card's numbers are those of the run's log."""

import json

import pytest
import torch

from checkpoints.export_files import write_described
from checkpoints.model_card import describe_run
from checkpoints.run_metrics import Validation, last_validation
from megatron_taipan.checkpoint.calibration import write_thresholds
from megatron_taipan.train.logs import JsonLines
from tests.checkpoints.made import memory_state


def write_log(run, *records) -> None:
    log = JsonLines(run / "log.jsonl")
    for record in records:
        log.write({"time": 1.0, **record})
    log.close()


def valid(step: int, ce: float, **more) -> dict:
    return {"event": "valid", "step": step, "ce": ce, "perplexity": 2.0, "tokens": 100, "s": 1.0, **more}


@pytest.mark.parametrize("names", [("layers.1.", "layers.3."), ("gate0/", "gate1/")])  # of now, and of old logs
def test_the_newest_validation_of_the_weights_is_taken(tmp_path, names):
    first, second = names
    gates = {f"{first}selected": 0.1, f"{first}alpha": 0.7, f"{second}selected": 0.3}
    write_log(
        tmp_path,
        valid(2, 9.0), {"event": "step", "step": 3, "loss": 1.0}, valid(4, 8.0), valid(6, 1.0),
        {"event": "note", "step": 4, "text": 'a "valid" word'},
        valid(4, 7.0, **gates),  # after a resume
        valid(2, 5.0),
    )  # fmt: skip
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"event": "valid", "step": 5, "ce": 1')  # cut off
    found = last_validation(tmp_path / "step_00000005", 5)
    assert found == Validation(4, 7.0, 2.0, 100, dict(zip((n.rstrip("./") for n in names), (0.1, 0.3), strict=True)))
    assert found.selected == pytest.approx(0.2)
    text = describe_run(memory_state("M S").config, 5, 500, found, 0.15)
    assert "validation after 4 steps: loss 7.0000 (nats a token), perplexity 2.00,\n  on 100 held-out tokens" in text
    assert "selective attention took 20.0% (mean over its layers)" in text and "to select 15.0% of" in text


def test_numbers_that_were_not_finite_are_none(tmp_path):
    write_log(tmp_path, valid(2, 3.0, **{"layers.1.selected": float("nan")}), valid(4, float("inf")))
    assert last_validation(tmp_path / "step_00000004", 4) == Validation(2, 3.0, 2.0, 100, {})


@pytest.mark.parametrize(("share", "capacity", "told"), [(0.01, None, True), (0.01, 0.2, False), (0.1, None, False)])
def test_an_export_tells_of_gates_that_are_practically_off_unless_they_are_calibrated(
    tmp_path, capsys, share, capacity, told
):
    checkpoint = tmp_path / "run" / "step_00000007"
    checkpoint.mkdir(parents=True)
    write_log(checkpoint.parent, valid(6, 3.0, **{"layers.1.selected": share}))
    if capacity:
        write_thresholds(checkpoint, {"layers.1.gate.threshold": 0.5}, capacity=capacity, tokens=10)
    state = memory_state("M S")
    state.path = checkpoint
    (tmp_path / "out").mkdir()
    write_described(state, tmp_path / "out", torch.float32, None, chats=False)
    said = capsys.readouterr().err
    assert ("note: in the validation after 6 steps layers.1 selects 1.00% of the tokens" in said) == told
    assert "calibrate" in said if told else "select" not in said


def test_no_log_is_no_validation(tmp_path):
    assert last_validation(tmp_path / "step_00000004", 4) is None
    (tmp_path / "log.jsonl").write_text(json.dumps({"event": "valid"}) + "\n[]\n")
    assert last_validation(tmp_path / "step_00000004", 4) is None
