"""What a run of experiments/real_text.py says of its gates, from logs and results of now and of before."""

import json
from math import log

import pytest

from experiments.real_text_report import context_table, draw_results, one_table, read_log

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


def result_of(loss: float, shares: list[float], perplexity: float | None = None) -> dict:
    return {
        "by_distance": {"all": [loss, 10]}, "by_context": {"1024": log(perplexity) if perplexity else None},
        "tokens": 8e6, "epochs": 1.0, "selected_evaluation": shares,
    }  # fmt: skip


def test_perplexity_by_context_is_the_geometric_mean_over_the_seeds():
    table = context_table({"b": [result_of(2.0, [], 2.0), result_of(2.0, [], 8.0)], "a": [result_of(1.0, [])]})
    assert table.splitlines()[2:] == ["| a | – |", "| b | 4.00 |"]


def test_the_picture_names_each_recipe_and_is_drawn_where_there_are_gates(tmp_path):
    def line(recipe: str, data: str, overrides: list[str], result: dict) -> dict:
        return {"run": {"recipe": recipe, "data": data, "overrides": overrides}, "result": result}

    swept = "model.gate.capacity={start: 0.5, end: 0.05, after: 0.3, until: 0.7}"
    records = [
        line("samba", "alone", [], result_of(1.7, [])),
        line("samba", "text", [], result_of(1.6, [])),
        line("paper", "text", [], result_of(1.8, [0.0, 0.1])),
        line("anneal-all-add-one", "text", [swept], result_of(1.7, [0.1, 0.2])),
    ]
    (drawn,) = draw_results(records, tmp_path / "r.jsonl")
    assert drawn.name == "r-share-2.svg"
    assert all(f">{name}<" in drawn.read_text() for name in ("samba", "paper", "C to 0.05"))
