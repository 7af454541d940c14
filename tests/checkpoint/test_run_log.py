"""A run's log as it was trained in the end: a resumed run takes steps again, and its later lines count."""

import json

import pytest

from megatron_taipan.checkpoint.run_log import find_log, read_course, read_records
from megatron_taipan.errors import UserError


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"event": "step", "st')
    return path


def step(number, ce):
    return {"event": "step", "step": number, "ce": ce}


def valid(number, ce):
    return {"event": "valid", "step": number, "ce": ce}


def test_where_a_run_went_back_what_came_later_counts(tmp_path):
    log = write(
        tmp_path / "log.jsonl",
        valid(0, 9.0), step(1, 8.0), step(2, 7.0), valid(2, 6.9), {"event": "save", "step": 2}, step(3, 6.0),
        step(4, 5.0), valid(4, 4.9),
        {"event": "start", "step": 2}, step(3, 6.5),  # resumed at 2, and has not come to step 4 again
    )  # fmt: skip
    course = read_course(tmp_path)
    assert [(r["step"], r["ce"]) for r in course.steps] == [(1, 8.0), (2, 7.0), (3, 6.5)]
    assert [(r["step"], r["ce"]) for r in course.valid] == [(0, 9.0), (2, 6.9)]
    assert [r["event"] for r in read_records(log, "save")] == ["save"] and len(list(read_records(log))) == 10


def test_a_validation_made_again_replaces_the_one_before(tmp_path):
    write(tmp_path / "log.jsonl", step(1, 8.0), valid(1, 7.0), valid(1, 6.0))
    assert [r["ce"] for r in read_course(tmp_path).valid] == [6.0]


def test_the_log_is_found_from_the_run_and_from_a_checkpoint(tmp_path):
    log = write(tmp_path / "log.jsonl", step(1, 1.0))
    (tmp_path / "step_00000001").mkdir()
    assert find_log(tmp_path) == find_log(tmp_path / "step_00000001") == find_log(log) == log


def test_no_log_and_a_log_without_steps_are_said(tmp_path):
    with pytest.raises(UserError, match="no log.jsonl"):
        read_course(tmp_path / "none")
    write(tmp_path / "log.jsonl", {"event": "start"})
    with pytest.raises(UserError, match="no training step"):
        read_course(tmp_path)
