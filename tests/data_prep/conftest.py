"""The real text that these tests share."""

import gzip
import json
from pathlib import Path

import pytest

SAMPLE = Path(__file__).parents[2] / "data_prep/sample/state_of_the_union.jsonl.gz"


@pytest.fixture(scope="package")
def speeches() -> list[str]:
    """The 103 speeches of the sample corpus."""
    with gzip.open(SAMPLE, "rt", encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]
