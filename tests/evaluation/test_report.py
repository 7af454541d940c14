"""The page of all results: what stands in the folder is in it, what does not is listed, and it needs nothing else."""

import base64
import json
import re

import pytest

from megatron_taipan.evaluation.__main__ import TASKS
from megatron_taipan.evaluation.__main__ import main as run_task
from megatron_taipan.evaluation.figures import Curve, write_curves
from megatron_taipan.evaluation.report import html_table, main, parts_of
from megatron_taipan.evaluation.results import write_results
from megatron_taipan.model.taipan import Taipan
from tests.checkpoint.test_weights import write_weights
from tests.inference.networks import small_config, small_model


def options_of(task: str, capsys) -> set[str]:
    with pytest.raises(SystemExit):
        run_task([task, "--help"])
    return set(re.findall(r"--[a-z-]+", capsys.readouterr().out))


@pytest.fixture
def folder(tmp_path):
    write_weights(tmp_path / "model", Taipan(small_config("M S W A"), seed=3))
    return tmp_path


def page_of(folder, *more: str) -> str:
    assert main([str(folder / "model"), "--out", str(folder / "out"), *more]) == 0
    return (folder / "out/report.html").read_text()


def test_results_and_pictures_are_in_the_page(folder):
    rows = [
        {"model": "m", "perplexity": 12.5, "note": None},
        {"model": "<script>n", "perplexity": None, "note": "gone"},
    ]
    write_results(folder / "out", "perplexity", rows, about={"data": "a & b"}, title="By length")
    write_results(folder / "out", "perplexity_by_position", [{"part": 1}], about={}, title="By position")
    write_curves(folder / "out/perplexity.svg", [Curve("m", [1, 2], [3, 4])], x="x", y="y")
    (folder / "out/qa_notes.txt").write_text("not a result")
    page = page_of(folder, "--title", "Five <families>")
    assert "<h1>Five &lt;families&gt;</h1>" in page
    for words in ("<h3>By length</h3>", "<h3>By position</h3>", "<td>12.5</td>", "a &amp; b", "&lt;script&gt;n"):
        assert page.count(words) == 1
    [picture] = re.findall(r'src="data:image/svg\+xml;base64,(.+?)"', page)
    assert base64.b64decode(picture) == (folder / "out/perplexity.svg").read_bytes()
    assert re.search(r"date: \d{4}-\d\d-\d\d; megatron_taipan: \d", page)


def test_the_page_needs_no_other_file_and_no_script(folder):
    write_results(folder / "out", "latency", [{"model": "m"}], about={}, title="T")
    page = page_of(folder)
    assert not re.search(r"<script|<link|@import|url\(|(src|href)=[\"'](?!data:)", page)


def test_tasks_without_a_result_are_listed_with_a_command_of_their_options(folder, capsys):
    write_results(folder / "out", "latency", [{"model": "m"}], about={}, title="T")
    page = page_of(folder)
    commands = dict(re.findall(r"<li>([\w-]+): <code>python -m megatron_taipan.evaluation (.+?)</code>", page))
    assert set(commands) == set(TASKS) - {"latency", "calibrate", "passkey", "report"}
    for task, command in commands.items():  # each option is one that the task has
        assert set(re.findall(r" (--[a-z-]+)", command)) <= options_of(task, capsys), command
    assert commands["curves"] == f"curves {folder / 'model'} --out {folder / 'out'}"
    assert commands["perplexity"].startswith(f"perplexity {folder / 'model'} --lengths ")


def test_the_parts_are_those_of_the_network():
    model = small_model("M S W A M")
    rows = parts_of(model.config, 300)
    *parts, whole = rows
    named = {row["part"][-2]: row for row in parts[:-1]}
    of_letter = {
        letter: sum(
            p.numel()
            for layer, at in zip(model.layers, "MSWAM", strict=True)
            if at == letter
            for p in layer.parameters()
        )
        for letter in "MSWA"
    }
    assert {letter: row["parameters"] for letter, row in named.items()} == of_letter
    assert whole["parameters"] == sum(p.numel() for p in model.parameters()) == sum(r["parameters"] for r in parts)
    for column in ("MFLOP a token", "weights, MiB", "state, MiB"):
        assert whole[column] == pytest.approx(sum(row[column] for row in parts))
    assert named["A"]["state, MiB"] == pytest.approx(2 * 300 * 2 * 6 * 2 / 2**20)  # keys, values; 2 heads of 6; bf16
    assert named["M"]["layers"] == 2 and whole["MFLOP a token"] == pytest.approx(model.num_flops_per_token(300) / 1e6)


def test_a_task_without_json_shows_its_text_and_a_damaged_file_is_named(folder, capsys):
    (folder / "out").mkdir()
    (folder / "out/selection.md").write_text("| a | b |")
    assert "<pre>| a | b |</pre>" in page_of(folder)
    (folder / "out/latency.json").write_text('{"rows": [')
    assert main([str(folder / "model"), "--out", str(folder / "out")]) == 2
    assert "latency.json" in capsys.readouterr().err


def test_the_selection_of_each_layer_is_a_column_and_what_was_read_is_told(folder):
    groups = [
        {"name": "all", "tokens": 9, "mean": 0.25, "shares": [0.125, 0.375]},
        {"name": "number", "tokens": 0, "mean": None, "shares": [None, None]},
    ]
    record = {"model": "runs/m", "text": "a & b.txt", "tokens": 9, "layers": [1, 3], "groups": groups}
    (folder / "out").mkdir()
    (folder / "out/selection.json").write_text(json.dumps(record))
    page = page_of(folder)
    assert "<tr><th>name</th><th>tokens</th><th>mean</th><th>layer 1</th><th>layer 3</th></tr>" in page
    assert "<tr><td>all</td><td>9</td><td>0.25</td><td>0.125</td><td>0.375</td></tr>" in page
    assert "<tr><td>number</td><td>0</td><td>–</td><td>–</td><td>–</td></tr>" in page
    assert "model: runs/m; text: a &amp; b.txt; tokens: 9<" in page


def test_what_zero_shot_needs_is_said_where_it_was_not_run(folder):
    [rest] = re.findall(r"<li>zero-shot: <code>[^<]+</code>([^<]+)</li>", page_of(folder))
    assert "needs lm_eval" in rest and "data in FOLDER" in rest


def test_columns_without_values_are_left_out():
    assert html_table([{"a": 1, "b": None}]).count("<th>") == 1


def test_a_path_without_a_model_is_refused(tmp_path, capsys):
    assert main([str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert str(tmp_path) in capsys.readouterr().err and not (tmp_path / "out").exists()
