"""The counts of passed layouts that the pages give in words are those of the tables."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
SECTION = re.compile(r"^## (.+?): (\d+) of (\d+) cases pass(?:ed)?\n(.*?)(?=^## |\Z)", re.M | re.S)
ONE_PROCESS = {"tensor": "1", "pipeline": "1", "data": "1", "context": "1"}


def rows(table: str) -> list[dict[str, str]]:
    """A table's rows by column; the first, without a name, is the result."""
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in table.splitlines() if line[:1] == "|"]
    head = ["result", *lines[0]]
    return [dict(zip(head, line, strict=True)) for line in lines[2:]]


def sections(page: str) -> dict[str, tuple[int, int, list[dict[str, str]]]]:
    """By title: passed and tried as the title has them, and the rows below it."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return {title: (int(passed), int(tried), rows(body)) for title, passed, tried, body in SECTION.findall(text)}


@pytest.mark.parametrize("page", ["parity.md", "parity-gpu.md"])
def test_a_title_counts_its_rows(page):
    found = sections(page)
    assert found
    for title, (passed, tried, below) in found.items():
        assert (passed, tried) == (sum(row["result"] == "ok" for row in below), len(below)), title


def test_the_page_on_performance_has_the_counts_of_layouts():
    """There a layout is more than one process; the tables have single processes too, as a scale."""
    counts, alone = [], []
    for _, _, below in sections("parity-gpu.md").values():
        layouts = [row for row in below if any(row.get(axis, "1") != size for axis, size in ONE_PROCESS.items())]
        counts.append((sum(row["result"] == "ok" for row in layouts), len(layouts)))
        alone.append(len(below) - len(layouts))
    text = " ".join((DOCS / "performance.md").read_text(encoding="utf-8").split())
    (fp32, bf16, graphs), (_, single, recorded) = counts, alone
    assert "{} of {} layouts in fp32, {} of {} in bf16, {} of {} as CUDA graphs".format(*fp32, *bf16, *graphs) in text
    assert f"{single} in bf16 and {recorded} as graphs, so it has {bf16[1] + single} and {graphs[1] + recorded}" in text
