"""A user reads in the changelog, in two minutes, what this version is."""

import re
from datetime import date
from pathlib import Path

from megatron_taipan import __version__

CHANGELOG = Path(__file__).resolve().parents[1] / "CHANGELOG.md"


def test_the_changelog_has_a_dated_entry_of_this_version_that_opens_with_a_short_summary():
    text = CHANGELOG.read_text(encoding="utf-8")
    versions = re.findall(r"^## \[([^\]]+)\](?: - (\S+))?$", text, re.M)
    assert versions[0] == ("Unreleased", "") and versions[1][0] == __version__
    days = [date.fromisoformat(day) for _, day in versions[1:]]
    assert days == sorted(days, reverse=True)
    for entry in re.split(r"^## ", text, flags=re.M)[3:]:
        summary, _, details = entry.partition("\n\n")[2].partition("\n### Details\n")
        assert 0 < len(summary.strip().splitlines()) <= 25 and details.count("<details>") == details.count("</details>")
