"""The protocol of the checkpoint folder: whatever is cut off or changed, nothing half-written is ever picked up."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_taipan.checkpoint.folder import (
    LATEST,
    MANIFEST,
    METADATA,
    WEIGHTS,
    checkpoints,
    find_newest,
    folder_name,
    incomplete,
    locate,
    remove_leftovers,
    remove_old,
    remove_taken_back,
    step_of,
)
from megatron_taipan.checkpoint.metadata import read_metadata
from megatron_taipan.checkpoint.verification import wrong_hashes
from megatron_taipan.errors import UserError
from tests.checkpoint.folders import make
from tests.durable import killed_at


def test_newest_complete_one_is_found_and_latest_points_at_it(tmp_path):
    assert find_newest(tmp_path / "nowhere") is None
    for step in (5, 20, 100):
        make(tmp_path, step)
    assert find_newest(tmp_path).path == tmp_path / "step_00000100"
    assert (tmp_path / LATEST).read_text().strip() == "step_00000100"
    assert incomplete(tmp_path / "step_00000100") is None
    assert wrong_hashes(tmp_path / "step_00000100", ["state/w.pt", METADATA]) == []
    assert read_metadata(tmp_path / "step_00000100")["progress"]["step"] == 100


@given(step=st.integers(0, 10**12))
def test_names_sort_like_steps(step):
    assert step_of(Path("x") / folder_name(step)) == step
    assert step_of(Path("x") / (folder_name(step) + ".tmp")) is None


@pytest.mark.parametrize("damage", ["no manifest", "empty manifest", "missing", "short", "long", "other manifest"])
def test_damage_is_passed_over_and_named(tmp_path, damage):
    good, bad = make(tmp_path, 1), make(tmp_path, 2)
    state = bad / "state" / "w.pt"
    match damage:
        case "no manifest":
            (bad / MANIFEST).unlink()
        case "empty manifest":
            (bad / MANIFEST).write_text("")
        case "missing":
            state.unlink()
        case "short":
            state.write_text("weight")
        case "long":
            state.write_text("weights 2 ")
        case "other manifest":
            (bad / MANIFEST).write_text("[1]")
    found = find_newest(tmp_path)
    assert found.path == good
    assert len(found.passed_over) == 1 and "step_00000002" in found.passed_over[0]
    with pytest.raises(UserError):
        locate(str(bad))
    assert locate(str(tmp_path)) == good


def test_a_crash_at_any_point_of_writing_leaves_the_older_checkpoint(tmp_path, monkeypatch):
    """Every system call that changes names or makes data durable may be the last one."""

    survived = 0
    for count in range(1, 60):
        directory = tmp_path / str(count)
        make(directory, 1)
        with killed_at(monkeypatch, count, ("rename", "replace", "fsync")) as killed:
            make(directory, 2)
        if not killed:
            break
        survived += 1
        found = find_newest(directory)
        assert found.path.name in ("step_00000001", "step_00000002")
        assert incomplete(found.path) is None and wrong_hashes(found.path, ["state/w.pt", METADATA]) == []
        assert (directory / LATEST).read_text().strip() in ("step_00000001", "step_00000002")
        remove_leftovers(directory)
        assert not list(directory.glob("*.tmp"))
        make(directory, 2)
        assert find_newest(directory).path.name == "step_00000002"
    assert survived >= 8  # there really were that many points to fail at


def test_an_existing_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    path = make(tmp_path, 3)
    (path / "state" / "w.pt").unlink()
    make(tmp_path, 3, "again")
    assert (path / "state" / "w.pt").read_text() == "again 3"


def test_keeping(tmp_path):
    for step in range(10, 70, 10):
        make(tmp_path, step)
    (tmp_path / "step_00000060" / "state" / "w.pt").unlink()  # damaged: does not count as one of the newest
    gone = remove_old(tmp_path, keep_last=2, keep_every=30)
    assert gone == ["step_00000010", "step_00000020"]
    assert [step_of(path) for path in checkpoints(tmp_path)] == [30, 40, 50, 60]
    assert remove_old(tmp_path, keep_last=None, keep_every=None) == []


def test_what_is_held_stays_until_the_next_time(tmp_path):
    for step in (10, 20, 30):
        make(tmp_path, step)
    asked = []
    assert remove_old(tmp_path, keep_last=1, keep_every=None, hold=lambda path: not asked.append(path.name)) == []
    assert asked == ["step_00000010", "step_00000020"]  # of those alone that would go
    assert remove_old(tmp_path, keep_last=1, keep_every=None) == asked


def test_a_checkpoint_just_written_is_never_pushed_out_by_newer_ones(tmp_path):
    """A run that passed over damaged ones goes on from before them."""
    for step in (10, 20, 30, 15):
        make(tmp_path, step)
    assert remove_old(tmp_path, keep_last=1, keep_every=None, written=15) == ["step_00000010"]
    assert [step_of(path) for path in checkpoints(tmp_path)] == [15, 20, 30]


def test_of_a_linked_checkpoint_the_link_is_deleted(tmp_path):
    """Another run's, with which this one began."""
    theirs = make(tmp_path / "theirs", 10)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / theirs.name).symlink_to(theirs)
    make(tmp_path / "ours", 20)
    assert remove_old(tmp_path / "ours", keep_last=1, keep_every=None) == [theirs.name]
    assert [step_of(path) for path in checkpoints(tmp_path / "ours")] == [20]
    assert incomplete(theirs) is None


def test_what_was_taken_back_is_no_longer_the_newest(tmp_path):
    for step in (10, 20, 30, 40):
        make(tmp_path, step)
    remove_taken_back(tmp_path, after=10, until=30)
    assert [step_of(path) for path in checkpoints(tmp_path)] == [10, 40]
    assert (tmp_path / LATEST).read_text().strip() == "step_00000010"


def test_weights_alone_of_steps_that_were_taken_back_go_too(tmp_path):
    for step in (10, 20, 40):
        (make(tmp_path, step)).rename(tmp_path / folder_name(step, WEIGHTS))
    make(tmp_path, 10)
    remove_taken_back(tmp_path, after=10, until=30)
    assert [step_of(path, WEIGHTS) for path in checkpoints(tmp_path, WEIGHTS)] == [10, 40]


def test_a_deletion_that_is_cut_short_leaves_no_checkpoint(tmp_path, monkeypatch):
    for step in (10, 20):
        make(tmp_path, step)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # killed before its first file
    assert remove_old(tmp_path, keep_last=1, keep_every=None) == ["step_00000010"]
    assert incomplete(tmp_path / "step_00000010") == "it has no manifest.json, so it was never completed"


def test_foreign_format_is_refused(tmp_path):
    path = make(tmp_path, 1)
    (path / METADATA).write_text('{"format": 99}')
    with pytest.raises(UserError, match="format 99"):
        read_metadata(path)
