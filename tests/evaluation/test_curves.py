"""Curves of runs from their logs."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from megatron_taipan.evaluation.curves import averaged, main, stretches


def write_run(folder, steps: int, loss: float, gates: dict[str, float]):
    folder.mkdir()
    shares = {
        f"{layer}{mark}selected": share for layer, share in gates.items() for mark in ("/" if "gate" in layer else ".")
    }
    lines = [
        {"event": "step", "step": n, "ce": loss + 100 / n if n != 3 else None, "tokens": 10, **shares}
        for n in range(1, steps + 1)
    ]
    lines.append({"event": "valid", "step": steps, "ce": loss, **{name: value / 2 for name, value in shares.items()}})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def words_of(path) -> set[str]:
    return {(e.text or "").strip() for e in ElementTree.parse(path).iter() if e.tag.endswith("text")}


def test_the_program_draws_several_runs(tmp_path, capsys):
    runs = [
        write_run(tmp_path / "one", 120, 2.0, {"layers.6": 0.2, "layers.13": 0.4}),
        write_run(tmp_path / "two", 4, 3.0, {"gate0": 0.5}),  # as logs before version 0.3 had it
        write_run(tmp_path / "three", 1, 4.0, {}),
    ]
    assert main([*runs, "--out", str(tmp_path / "out")]) == 0
    first, second, third = json.loads((tmp_path / "out/curves.json").read_text())["rows"]
    assert first["training loss"] == pytest.approx(sum(2 + 100 / n for n in range(71, 121)) / 50)
    assert (first["steps"], first["tokens"], first["validation loss"]) == (120, 1200, 2.0)
    assert first["selected in training"] == pytest.approx(0.3)
    assert first["selected in validation"] == pytest.approx(0.15)
    assert second["training loss"] == pytest.approx(3 + (100 + 50 + 25) / 3)  # step 3 was not finite
    assert third["selected in training"] is None
    words = words_of(tmp_path / "out/curves.svg")
    assert {f"{run}, {kind}" for run in runs for kind in ("training", "validation")} <= words
    assert {f"{runs[0]} layers.6", f"{runs[0]} layers.13, validation", f"{runs[1]} gate0"} <= words_of(
        tmp_path / "out/curves_selected.svg"
    )
    assert "curves_selected.svg" in capsys.readouterr().out


def test_validation_sets_have_curves_of_their_own(tmp_path):
    run = write_run(tmp_path / "run", 5, 2.0, {})
    sets = {"wiki": {"ce": 2.5}, "code": {"ce": None}}  # not finite
    with (tmp_path / "run/log.jsonl").open("a") as file:
        file.write(json.dumps({"event": "valid", "step": 5, "ce": 2.0, "sets": sets}) + "\n")
    assert main([run, "--out", str(tmp_path / "out")]) == 0
    words = words_of(tmp_path / "out/curves.svg")
    assert f"{run}, wiki" in words and f"{run}, code" not in words


def test_long_runs_are_averaged_and_every_step_counts_once():
    steps = [{"step": n, "ce": float(n)} for n in range(1, 1002)]
    x, y = averaged(steps, lambda record: record["ce"])
    assert len(x) <= 200 and x[:2] == [6, 12] and y[:2] == [3.5, 9.5] and x[-1] == 1001
    assert sum(map(len, stretches(steps))) == 1001
    assert averaged(steps[:3], lambda record: record["ce"]) == ([1, 2, 3], [1.0, 2.0, 3.0])


def test_a_folder_without_a_log_is_refused(tmp_path, capsys):
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "log.jsonl" in capsys.readouterr().err and not (tmp_path / "out").exists()
