"""Pictures and tables that evaluation tasks leave."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from megatron_taipan.errors import UserError
from megatron_taipan.evaluation.figures import Curve, write_curves, write_heat_map
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
