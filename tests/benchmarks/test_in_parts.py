"""Runs kept in a file: none is made twice, failures are tried again, and no run starts that would end too late."""

import json
import threading

import pytest

from benchmarks import in_parts
from megatron_taipan.errors import UserError


class Stub:
    """Takes the seconds that a run asks for; fails where it says so. Its clock is the one that `make` reads."""

    def __init__(self):
        self.now, self.made = 100.0, []

    def run(self, what, place):
        self.made.append(what["name"])
        self.now += what.get("seconds", 1)
        if what["name"] in self.broken:
            raise RuntimeError("no luck")
        return {"score": len(self.made)}

    def make(self, path, wanted, minutes=None, broken=()):
        self.made, self.broken = [], broken
        left = in_parts.make_runs(path, wanted, self.run, minutes, clock=lambda: self.now)
        return self.made, left


def named(*names, **more):
    return [{"name": name, "pairs": (4, 8), **more} for name in names]


def test_what_has_a_result_is_not_made_again_and_what_failed_is(tmp_path):
    path, stub = tmp_path / "deep" / "runs.jsonl", Stub()
    assert stub.make(path, named("a", "b", "c"), broken=("b",)) == (["a", "b", "c"], 1)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[1]["error"] == "RuntimeError: no luck" and "result" not in lines[1]
    assert stub.make(path, named("a", "b", "c", "d")) == (["b", "d"], 0)
    assert stub.make(path, named("a", "b", "c", "d")) == ([], 0)
    records = in_parts.read_runs(path)
    assert sorted(r["run"]["name"] for r in records.values() if "result" in r) == list("abcd")
    assert stub.make(path, named("a", seed=1)) == (["a"], 0)  # another setting is another run


def test_no_run_starts_that_would_end_too_late(tmp_path):
    runs = [{"name": str(k), "seconds": seconds} for k, seconds in enumerate((20, 30, 10, 5, 5))]
    path, stub = tmp_path / "runs.jsonl", Stub()
    # After three runs 60 s have gone; a fourth as long as the longest, 30 s, would end at 90 s.
    assert stub.make(path, runs, minutes=89 / 60) == (["0", "1", "2"], 2)
    assert stub.make(path, runs, minutes=89 / 60) == (["3", "4"], 0)
    assert Stub().make(tmp_path / "again.jsonl", runs, minutes=90 / 60)[0] == ["0", "1", "2", "3"]
    assert Stub().make(tmp_path / "none.jsonl", runs, minutes=0)[0] == ["0"]  # how long one takes is not known before


def test_places_work_side_by_side_and_each_run_is_made_once(tmp_path):
    both, seen = threading.Barrier(2, timeout=20), []

    def run(what, place):
        if what["name"] in "ab":
            both.wait()  # passes only if two runs are under way at once
        seen.append((what["name"], place))
        return {}

    runs = named("a", "b", "c", "d", "e")
    assert in_parts.make_runs(tmp_path / "runs.jsonl", runs, run, devices=("0", "1")) == 0
    assert sorted(name for name, _ in seen) == list("abcde") and {place for _, place in seen[:2]} == {"0", "1"}
    assert len(in_parts.read_runs(tmp_path / "runs.jsonl")) == 5


def test_what_is_expected_counts_until_a_run_has_ended(tmp_path):
    stub = Stub()
    stub.made, stub.broken = [], ()
    given = {"minutes": 1, "clock": lambda: stub.now}
    assert in_parts.make_runs(tmp_path / "none.jsonl", named("a"), stub.run, expected=61, **given) == 1
    assert in_parts.make_runs(tmp_path / "one.jsonl", named("a", "b"), stub.run, expected=60, **given) == 1


@pytest.mark.parametrize("torn", ['{"run": {"na', '{"run": {"name": "b", "pairs": [4, 8]}, "result"'])
def test_a_line_that_was_cut_off_costs_that_run_alone(tmp_path, torn):
    path, stub = tmp_path / "runs.jsonl", Stub()
    stub.make(path, named("a"))
    path.write_text(path.read_text() + torn)
    assert stub.make(path, named("a", "b")) == (["b"], 0)
    assert stub.make(path, named("a", "b")) == ([], 0)


def test_a_file_without_runs_makes_no_table(tmp_path):
    with pytest.raises(UserError, match="nothing.jsonl holds no run"):
        in_parts.read_results(tmp_path / "nothing.jsonl")
