"""The fuzz targets on mutated seeds, for a few seconds; tests/fuzz/count.py and run.py do it for hours."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz import targets
from tests.fuzz.count import count_findings
from tests.fuzz.seeds import MAKERS, seeds


@pytest.mark.parametrize("name", ["index", "lines", "packed", "text"])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_mutated_seeds(tmp_path_factory, name, data):
    """Hypothesis shrinks what it finds."""
    raw = bytearray(data.draw(st.sampled_from(seeds(name))))
    for _ in range(data.draw(st.integers(0, 4))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b"\\", b'"', b"\n", b"\\u", b"\xff" * 8, bytes(8)]))
        )
    getattr(targets, name)(tmp_path_factory.mktemp("fuzz"), bytes(raw))


@pytest.mark.parametrize("name", list(MAKERS))
def test_valid_inputs_and_some_mutated_ones(tmp_path, name):
    for seed in seeds(name):
        getattr(targets, name)(tmp_path, seed)
    assert count_findings([name], 300, first=0, kept=tmp_path / "found").findings == []


def test_a_finding_is_seen_and_kept(tmp_path, monkeypatch):
    def target(folder, data):
        assert len(data) % 7

    monkeypatch.setattr(targets, "text", target)
    result = count_findings(["text"], 100, first=0, kept=tmp_path / "found")
    assert 0 < len(result.findings) == len(list((tmp_path / "found").iterdir())) < 100
