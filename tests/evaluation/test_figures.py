"""Pictures and tables that evaluation tasks leave."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from megatron_taipan.errors import UserError
from megatron_taipan.evaluation.figures import Curve, write_bars, write_curves, write_heat_map
from megatron_taipan.evaluation.results import write_results


def words_of(path) -> set[str]:
    return {(e.text or "").strip() for e in ElementTree.parse(path).iter() if e.tag.endswith("text")}


def test_curves_name_their_axes_lines_and_marks(tmp_path):
    curves = [Curve("taipan", [1024, 2048], [3.0, 2.5]), Curve("mamba2", [1024, 2048], [3.1, 3.0])]
    for name in ("a", "b"):
        write_curves(tmp_path / f"{name}.svg", curves, x="tokens", y="loss", log_x=True, marks={"trained": 2048})
    assert {"tokens", "loss", "taipan", "mamba2", "trained"} <= words_of(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()  # the same results, the same file


def test_many_curves_have_a_colour_each_and_words_beside_their_points(tmp_path):
    curves = [Curve(f"recipe {n}", [0.0, 1.0], [0.1 * n, 0.2], "o-", ("", f"C={n}")) for n in range(15)]
    write_curves(tmp_path / "m.svg", curves, x="x", y="y", ticks={0.0: "none", 1.0: "all"}, y_range=(0.0, 1.0))
    assert {"none", "all", *(c.name for c in curves), *(c.words[1] for c in curves)} <= words_of(tmp_path / "m.svg")
    strokes = {
        e.get("style") for e in ElementTree.parse(tmp_path / "m.svg").iter() if e.get("clip-path") and e.get("style")
    }
    assert len({style for style in strokes if "fill: none" in style}) == 15


def test_bars_are_as_high_as_the_values_in_groups_by_model(tmp_path):
    values = {("boolq", "a"): 0.5, ("boolq", "b"): 1.0, ("race", "a"): 0.25, ("race", "b"): None}
    values |= {("piqa", "a"): 0.0}
    rows = [{"task": task, "model": model, "score": value} for (task, model), value in values.items()]
    path = tmp_path / "new" / "b.svg"
    write_bars(path, rows, group="task", value="score", x="task", y="score", y_range=(0.0, 1.0))
    assert {"boolq", "race", "a", "b", "task", "score", "0", "–"} <= words_of(path)
    bars = [e.get("d").split() for e in ElementTree.parse(path).iter() if e.get("clip-path") and e.get("d")]
    corners = [
        [(float(x), float(y)) for x, y in zip(d[1::3], d[2::3], strict=False)] for d in bars if d.count("L") == 3
    ]
    height = [max(y for _, y in c) - min(y for _, y in c) for c in corners]  # a's three, then b's only one
    left = [min(x for x, _ in c) for c in corners]
    assert [h / height[3] for h in height] == pytest.approx([0.5, 0.25, 0.0, 1.0], abs=1e-3)
    assert left[0] < left[3] < left[1]  # side by side in the first group


def test_a_heat_map_shows_its_values(tmp_path):
    write_heat_map(
        tmp_path / "new" / "m.svg", [[0.25, 1.0]], rows=["deep"], columns=["1K", "2K"], x="length", y="depth"
    )
    assert {"0.25", "1", "deep", "1K", "length", "depth"} <= words_of(tmp_path / "new" / "m.svg")


def test_results_are_json_and_markdown(tmp_path):
    rows = [{"model": "m", "loss": 2.34567, "tokens": 12345}, {"model": "n", "loss": None, "tokens": 1}]
    write_results(tmp_path / "out", "perplexity", rows, about={"device": "cpu"}, title="Perplexity")
    assert json.loads((tmp_path / "out/perplexity.json").read_text())["rows"] == rows
    text = (tmp_path / "out/perplexity.md").read_text()
    assert "| m | 2.346 | 12,345 |" in text and "| n | – | 1 |" in text and "- device: cpu" in text


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="was not written"):
        write_results(tmp_path / "file", "t", [{"a": 1}], about={}, title="T")
