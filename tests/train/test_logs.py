"""Logs: whole lines, room or no room; what the start before did; boards that may fail."""

import errno
import json
import logging
import os
import sys
import types
from pathlib import Path

import pytest

from megatron_taipan.checkpoint.run_log import records_backwards
from megatron_taipan.errors import UserError
from megatron_taipan.train import logs
from megatron_taipan.train.logs import JsonLines, TextLog, open_boards
from megatron_taipan.train.summary import unfinished_run
from tests.train.toy import toy_config


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_half_a_line_of_a_killed_process_is_cut_off(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a": 3, "b')
    JsonLines(path).write({"a": 4.0, "b": float("inf")})
    assert lines(path) == [{"a": 1}, {"a": 2}, {"a": 4.0, "b": None}]


def test_lines_wait_while_the_disk_is_full_and_none_is_torn(tmp_path, monkeypatch):
    path, write, room = tmp_path / "log.jsonl", os.write, [10_000]

    def full_after(handle: int, data: bytes) -> int:
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = write(handle, data[: room[0]])  # a disk takes what fits
        room[0] -= taken
        return taken

    monkeypatch.setattr(logs.os, "write", full_after)
    log = JsonLines(path)
    assert log.write({"n": 0}) is None
    room[0] = 4
    for n in (1, 2):
        assert log.write({"n": n}).errno == errno.ENOSPC
        room[0] = 0
    assert lines(path) == [{"n": 0}]
    room[0] = 10_000
    assert log.write({"n": 3}) is None
    assert lines(path) == [{"n": n} for n in range(4)]


def test_log_is_made_anew_when_its_folder_was_moved(tmp_path):
    (tmp_path / "run").mkdir()
    log = JsonLines(tmp_path / "run" / "log.jsonl")
    log.write({"n": 0})
    (tmp_path / "run").rename(tmp_path / "gone")
    assert log.write({"n": 1}).errno == errno.ENOENT
    (tmp_path / "run").mkdir()
    assert log.write({"n": 2}) is None
    assert lines(tmp_path / "gone" / "log.jsonl") == [{"n": 0}]
    assert lines(tmp_path / "run" / "log.jsonl") == [{"n": 1}, {"n": 2}]


@pytest.mark.parametrize("count", [0, 1, 3, 5000])
def test_records_come_backwards_whatever_the_block(tmp_path, count):
    path = tmp_path / "log.jsonl"
    records = [{"n": n, "text": "x" * (n % 97)} for n in range(count)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + '{"torn')
    assert list(records_backwards(path)) == records[::-1]
    assert list(records_backwards(tmp_path / "none")) == []


def test_killed_start_is_summed_up_and_one_that_ended_is_not(tmp_path):
    path = tmp_path / "log.jsonl"
    steps = [
        {"event": "step", "step": n, "ce": 5.0 - n, "skipped": int(n == 2), "tokens": 10, "step_s": 0.5}
        for n in (1, 2, 3)
    ]
    old = [{"event": "start"}, {"event": "step", "step": 9, "ce": 9.0, "skipped": 0, "tokens": 1, "step_s": 1.0}]
    records = [*old, {"event": "end"}, {"event": "start"}, *steps, {"event": "save", "step": 2, "stall_s": 0.25}]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    summary, last = unfinished_run(path)
    assert (summary.steps, summary.tokens, summary.seconds, summary.skipped) == (3, 30, 1.5, 1)
    assert (summary.first_loss, summary.last_loss, summary.saves, summary.stall_s, last) == (4.0, 2.0, 1, 0.25, 3)
    for ending in ({"event": "end"}, {"event": "killed"}):
        path.write_text("".join(json.dumps(r) + "\n" for r in [*records, ending]))
        assert unfinished_run(path) is None


def test_text_log_rotates_and_never_raises(tmp_path):
    text = TextLog(toy_config("data", tmp_path / "run", log={"text_mb": 0.001, "text_files": 2}), rank=3)
    for n in range(100):
        text.write(f"line {n}", logging.INFO)
    files = sorted(path.name for path in (tmp_path / "run" / "logs").iterdir())
    assert files == ["rank_00003.log", "rank_00003.log.1", "rank_00003.log.2"]
    assert "line 99" in (tmp_path / "run" / "logs" / "rank_00003.log").read_text()
    (tmp_path / "run").rename(tmp_path / "gone")
    (tmp_path / "run").write_text("a file where the folder was")
    text.write("lost")
    text.close()


class FakeRun:
    def __init__(self, **options):
        self.options, self.metrics, self.logged = options, [], []

    def define_metric(self, name, **options):
        self.metrics.append((name, options))

    def log(self, values):
        self.logged.append(values)

    def finish(self):
        pass


def fake_wandb(monkeypatch, fault: Exception | None = None) -> list[FakeRun]:
    runs: list[FakeRun] = []

    def init(**options):
        if fault:
            raise fault
        runs.append(FakeRun(**options))
        return runs[-1]

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    return runs


def test_wandb_gets_the_curves_and_a_resumed_run_goes_on_in_the_same_one(tmp_path, monkeypatch):
    runs = fake_wandb(monkeypatch)
    config = toy_config("data", tmp_path, log={"tensorboard": False, "wandb": True})
    for step in (0, 3):
        boards, faults = open_boards(config, step)
        assert faults == []
        boards[0].scalars({"train/ce": 2.5}, step + 1)
        boards[0].close()
    assert len({run.options["id"] for run in runs}) == 1 and len(runs) == 2
    assert runs[1].options["resume"] == "allow" and runs[1].options["config"]["train"]["steps"] == 6
    assert ("*", {"step_metric": "step"}) in runs[0].metrics
    assert runs[1].logged == [{"train/ce": 2.5, "step": 4}]


def test_wandb_that_fails_is_told_and_wandb_that_is_not_installed_is_refused(tmp_path, monkeypatch):
    config = toy_config("data", tmp_path, log={"tensorboard": False, "wandb": True})
    fake_wandb(monkeypatch, RuntimeError("no network"))
    boards, faults = open_boards(config, 0)
    assert boards == [] and "no network" in faults[0]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install"):
        open_boards(config, 0)


def test_wandb_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    boards, faults = open_boards(toy_config("data", tmp_path, log={"tensorboard": False, "wandb": True}), 0)
    assert faults == []
    boards[0].scalars({"train/ce": 2.5}, 1)
    boards[0].close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
