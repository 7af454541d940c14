"""The recall experiment: rows against a plain reading of the task, what the gates are told, recipes, scores, tables."""

import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import recall
from experiments.gate_vectors import log_of
from experiments.recall_report import make_report
from experiments.recipes import RECIPES, gate_options
from megatron_taipan.gate_config import GateConfig
from megatron_taipan.layer_kinds.metrics import LayerMetrics
from megatron_taipan.train.schedule import gate_step

CPU = torch.device("cpu")
TOY = replace(
    recall.SMALL, seq_len=16, pairs=(2, 4), window=16, vocab_size=32, d_model=16, d_ff=16, headdim=8, chunk_size=8,
    steps=2, batch=4, warmup=1, test_rows=6,
)  # fmt: skip


def answers(row, half):
    """What a reader of one row knows: (pairs it was shown, the answer at each place that asks)."""
    known, at = {}, 0
    while at + 1 < len(row) and row[at + 1] >= half:
        known[row[at]] = row[at + 1]
        at += 2
    return known, {place: known[token] for place, token in enumerate(row) if place >= at and token}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 10), st.integers(0, 30), st.integers(0, 1000), st.sampled_from([32, 256]))
def test_rows_ask_for_every_key_once_and_the_label_is_its_value(n_pairs, filler, seed, vocab):
    s = replace(TOY, seq_len=3 * n_pairs + filler, vocab_size=vocab)
    tokens, labels = recall.make_rows(s, n_pairs, 5, torch.Generator().manual_seed(seed))
    for row, wanted in zip(tokens.tolist(), labels.tolist(), strict=True):
        known, asked = answers(row, vocab // 2)
        assert len(row) == s.seq_len and len(known) == n_pairs  # distinct keys
        assert all(0 < key < vocab // 2 <= value < vocab for key, value in known.items())
        assert {place: label for place, label in enumerate(wanted) if label != -1} == asked
        assert sorted(row[place] for place in asked) == sorted(known)


def test_a_batch_has_as_many_rows_of_each_number_of_pairs_and_others_at_the_next_step():
    generator = torch.Generator().manual_seed(0)
    tokens, labels = recall.make_batch(TOY, generator)
    assert (labels >= 0).sum(1).tolist() == [2, 2, 4, 4]
    assert not torch.equal(tokens, recall.make_batch(TOY, generator)[0])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains(recipe):
    model = recall.make_model(recall.pattern_of(recipe), gate_options(recipe), TOY, seed=0)
    before = [p.detach().clone() for p in model.parameters()]
    losses, metrics = recall.train_recall(model, TOY, 0, CPU)
    assert losses.isfinite().all() and losses.shape == (2,)
    assert metrics.isfinite().all() and metrics.shape == (2, 5 * (RECIPES[recipe].attention == "S"))
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_change_of_a_scheduled_option_replaces_what_it_leads_to():
    assert gate_options("paper", capacity=0.3, tau=0.5) == {"capacity": 0.3, "tau": 0.5}
    annealed = GateConfig(**gate_options("anneal-all-add", capacity=0.05))
    assert (annealed.capacity.start, annealed.final_capacity, annealed.gradient) == (0.5, 0.05, "all")
    assert gate_options("anneal")["capacity"]["end"] == 0.15  # the recipe itself is as it was
    assert GateConfig(**gate_options("lambda-all", budget_lambda=2.0)).budget_lambda.end == 2.0


def test_gates_are_told_what_the_trainer_would_tell_them():
    """Two S layers, everything scheduled; the shares are read on the host here, as the trainer does."""
    gate = {**gate_options("anneal-sampled-add"), "budget": "batch", "tau": {"start": 1, "end": 0.5},
            "gradient_share": 0.5}  # fmt: skip
    s = replace(TOY, steps=6)
    model = recall.make_model("M S S", gate, s, seed=0)
    told, seen, names = [], [], model.layer_metrics
    forward = model.forward

    def watched(*args, **options):
        told.append(options["gate"].tolist())
        out = forward(*args, **options)
        seen.append([share.item() for share in names.of_gates(model.named_metrics(out), "selected")])
        return out

    model.forward = watched
    _, metrics = recall.train_recall(model, s, 0, CPU)
    for step in range(s.steps):
        shares = seen[step - 1] if step else []
        assert told[step] == pytest.approx(gate_step(model.config.gate, step, s.steps, shares, 2).vector())
    assert metrics[:, names.gate_places("selected")].tolist() == seen
    assert len({share for pair in seen for share in pair}) > 4  # so that an exchange would have shown


def test_scores_are_those_of_a_plain_count(monkeypatch):
    monkeypatch.setattr(recall, "TOKENS_AT_ONCE", 4 * TOY.seq_len)  # a part of four rows, and one of two
    model = recall.make_model("M S S", {}, TOY, seed=0).eval()
    with torch.no_grad():
        for gate in recall.gates_of(model):
            gate.weight.mul_(50)
    found = recall.score_recall(model, TOY, 4, 0, CPU)
    tokens, labels = recall.make_rows(TOY, 4, 6, torch.Generator().manual_seed(9000))
    chosen = []
    for gate in recall.gates_of(model):
        gate.register_forward_hook(lambda _, __, out: chosen.append(out.selected.tolist()))
    with torch.no_grad():
        best = model(tokens).logits.argmax(-1).tolist()
    of = {"accuracy": [], "selected": [], "asking": [], "others": []}
    for row in range(6):
        for place in range(16):
            asks = labels[row, place].item() != -1
            picks = [gate[row][place] for gate in chosen]
            of["accuracy"] += [best[row][place] == labels[row, place].item()] if asks else []
            of["asking" if asks else "others"] += picks
            of["selected"] += picks
    assert found == pytest.approx({name: sum(v) / len(v) for name, v in of.items()}, abs=1e-4)
    assert found["asking"] != found["others"]


def test_the_log_has_eight_points_with_the_last():
    names = LayerMetrics(recall.make_model("M S", {}, TOY, seed=0).config)
    lines = log_of(torch.arange(100.0), torch.full((100, 5), 0.25), names)
    assert [line["step"] for line in lines] == [0, 14, 28, 42, 57, 71, 85, 99]
    metrics = ("selected", "selected_eval", "alpha", "entropy", "budget")
    assert lines[-1] == {"step": 99, "loss": 99, **{f"layers.1.{name}": 0.25 for name in metrics}}
    without = LayerMetrics(recall.make_model("M", {}, TOY, seed=0).config)
    assert len(log_of(torch.zeros(3), torch.zeros(3, 0), without)) == 3


def test_the_plan_has_each_run_once():
    options, s = recall.parse_arguments(
        "--seq-len 256 --recipes mamba2 samba paper anneal --seeds 0 1 --capacity 0.05 0.3 --window 64 128".split()
    )
    assert s.pairs == (16, 32, 64) and s.window == 256
    runs = recall.recall_runs(options, s)
    assert [r["seed"] for r in runs] == [0] * 11 + [1] * 11  # mamba2 once, samba by window, the gates by both
    first = [(r["recipe"], r["changes"].get("capacity"), r["settings"]["window"]) for r in runs[:11]]
    assert sorted(first, key=str) == sorted(
        [("mamba2", None, 256), ("samba", None, 64), ("samba", None, 128)]
        + [(name, c, w) for name in ("paper", "anneal") for c in (0.05, 0.3) for w in (64, 128)],
        key=str,
    )
    assert next(r for r in runs if r["recipe"] == "anneal")["gate"]["capacity"]["end"] == 0.05


@pytest.mark.parametrize("flags", ["--pairs 4 30", "--score-pairs 22", "--batch 127", "--vocab-size 16"])
def test_rows_that_cannot_be_made_are_the_users_error(flags, capsys):
    assert recall.main(flags.split()) == 2
    assert "pairs" in capsys.readouterr().err


def test_the_program_keeps_its_runs_and_makes_tables_of_them(tmp_path, capsys):
    out = tmp_path / "recall.jsonl"
    toy = "--small --steps 2 --batch 3 --test-rows 4 --warmup 1 --score-pairs 20 --recipes samba paper random".split()
    assert recall.main(["--out", str(out), *toy]) == 0
    written = out.read_text()
    assert recall.main(["--out", str(out), *toy]) == 0 and out.read_text() == written
    paper = json.loads(written.splitlines()[1])["result"]
    assert list(paper["scores"]) == ["evaluation", "training", "calibrated"]
    assert list(paper["scores"]["calibrated"]) == ["4", "8", "16", "20"] and len(paper["thresholds"]) == 1
    assert paper["scores"]["calibrated"]["8"]["selected"] == pytest.approx(0.15, abs=0.1)
    capsys.readouterr()
    assert recall.main(["--out", str(out), "--table"]) == 0
    text = capsys.readouterr().out
    assert "| 20 pairs |" in text and "| paper, calibrated |" in text and (tmp_path / "recall.md").exists()
    assert "| random |" in text and "| random, calibrated |" not in text  # no threshold changes what is drawn
    assert len(list(tmp_path.glob("recall-*.svg"))) == 2


def drawn(picture) -> list[list[tuple[float, float]]]:
    """The points of each curve of a picture by matplotlib, in the picture's coordinates: y grows downward."""
    paths = [e for e in ET.parse(picture).iter() if e.tag.endswith("path") and "fill: none" in e.get("style", "")]
    curves = [re.findall(r"[ML] (\S+) (\S+)", path.get("d")) for path in paths if path.get("clip-path")]
    return [[(float(x), float(y)) for x, y in points] for points in curves]


def record(recipe, seed, accuracy, selected=None, old=False, **changes):
    of_gate = {} if selected is None else {"selected": selected, "asking": 0.9, "others": 0.1}
    scores = {n: {"accuracy": value, **of_gate} for n, value in zip(("4", "8"), accuracy, strict=True)}
    result = {"params": 1234, "seconds": 3, "scores": {"evaluation": scores}}
    if selected is not None:
        result["scores"]["calibrated"] = scores
        gate = {"selected": 0.15, "selected_eval": selected, "alpha": 0.2, "entropy": 0.1, "budget": 0.0}
        new = {"layer_metrics": {f"layers.2.{name}": value for name, value in gate.items()}}
        result |= {"gates": [gate]} if old else new
    run_settings = {"seq_len": 64, "window": 64, "pairs": [4, 8], "score_pairs": []}
    run = {"recipe": recipe, "changes": changes, "seed": seed, "pattern": recall.pattern_of(recipe)}
    return {"run": {**run, "settings": run_settings}, "result": result}


@pytest.mark.parametrize("old", [False, True], ids=["by layer", "a list of gates"])
def test_tables_have_means_and_seeds_and_pictures_a_point_each(tmp_path, old):
    records = [
        record("samba", 1, (0.8, 0.6)), record("samba", 0, (1.0, 0.8)),
        record("paper", 0, (0.5, 0.25), 0.2, old), record("paper", 0, (0.75, 0.25), 0.4, old, capacity=0.3),
    ]  # fmt: skip
    records.append({"run": {**record("random", 2, (0, 0))["run"]}, "error": "RuntimeError: no luck"})
    text = make_report(records, tmp_path / "recall.jsonl")
    assert "| samba | `M*2 W M*2` | 1,234 | 0.90 (1.00, 0.80) | 0.70 (0.80, 0.60) | 0.80 (0.90, 0.70) | – |" in text
    assert "| paper, C=0.3 | `M*2 S M*2` | 1,234 | 0.75 | 0.25 | 0.50 | 0.15 | 0.40 | 0.90 | 0.10 | 0.20 |" in text
    assert "- random, seed 2: RuntimeError: no luck" in text
    for kind, lines in (("pairs", [2, 2, 2]), ("share", [1, 2])):
        curves = drawn(tmp_path / f"recall-{kind}-64-1.svg")
        assert [len(points) for points in curves] == lines
    # y of the share picture: 0.80 of samba above 0.50 and 0.375 of paper; x: samba's all tokens at the right
    (samba,), (low, high) = curves
    assert samba[1] < high[1] < low[1] and low[0] < high[0] < samba[0]
    assert (high[0] - low[0]) / (samba[0] - low[0]) == pytest.approx(0.2 / 0.8, abs=0.01)
