"""What a run of experiments/real_text.py says of its gates, from logs and results of now and of before."""

import json

import pytest

from experiments.real_text_report import one_table, read_log

SPELT = {"now": ("layers.1.", "layers.4."), "before": ("gate0/", "gate1/")}


def write_log(path, first: str, second: str) -> None:
    lines = []
    for step in range(1, 5):
        values = {f"{layer}{name}": step / 10 + k for k, layer in enumerate((first, second)) for name in METRICS}
        common = {
            "step": step,
            "ce": 5.0 - step,
            "tokens": 8,
            "tokens_per_s": 2.0,
            "skipped": 0,
            "epochs/data": step / 4,
        }
        lines.append({"event": "step", **common, **values})
    lines.append({"event": "valid", "step": 4, "ce": 1.0, f"{first}selected": 0.25, f"{second}selected": 0.75})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


METRICS = ("selected", "selected_eval", "alpha", "entropy", "budget")


@pytest.mark.parametrize("spelling", SPELT)
def test_a_log_gives_each_gates_means(tmp_path, spelling):
    write_log(tmp_path / "log.jsonl", *SPELT[spelling])
    first, second = ("layers.1", "layers.4") if spelling == "now" else ("gate0", "gate1")
    found = read_log(tmp_path / "log.jsonl")
    assert found["selected_training"] == found["entropy"] == {first: 0.25, second: 1.25}
    assert found["selected_evaluation"] == {first: 0.25, second: 0.75}
    selected = {first: 0.4, second: 1.4}
    assert found["course"][-1] == {"step": 4, "ce": 1.0, "selected": selected, "selected_eval": selected}


def test_a_table_joins_results_with_lists_and_with_names():
    result = {"by_distance": {"all": [1.5, 10]}, "params": 1e6, "tokens_per_s": 5.0}
    named = {
        "selected_training": {"layers.1": 0.1, "layers.4": 0.3},
        "selected_evaluation": {"layers.1": 0.5, "layers.4": 1},
    }
    listed = {"selected_training": [0.3, 0.5], "selected_evaluation": [0.5, 0]}
    assert "| 0.20, 0.40 | 0.50, 0.50 |" in one_table({"paper": [result | named, result | listed]})
    without = {"selected_training": {}, "selected_evaluation": []}
    assert "| – | – |" in one_table({"samba": [result | without]})
