"""Writing a checkpoint: behind the training, without changing it, and without ending it where it fails."""

import os
import time
from pathlib import Path

import torch

from megatron_taipan.checkpoint.folder import find_newest
from tests.checkpoint.test_loading import everything, tree_of
from tests.distributed.launch import launch
from tests.train.runs import log, records, runs, steps_so_far
from tests.train.toy import write_data


def test_a_full_disk_on_one_rank_keeps_the_run_and_the_checkpoint_before(tmp_path):
    tree = tree_of(write_data(tmp_path / "data"), tmp_path / "run", "2 data, stage 1", steps=4) | {
        "checkpoint": {"dir": str(tmp_path / "run"), "save_every": 1}
    }
    for results in launch(2, full_disk_at_step_2, tree):
        assert results == [0]
    names = sorted(path.name for path in (tmp_path / "run").glob("step_*"))
    assert names == ["step_00000001", "step_00000003", "step_00000004"]
    (alarm,) = log(tmp_path / "run", "alarm")
    assert "step 2: " in alarm["text"] and "rank 1: No space left on device" in alarm["text"]


def full_disk_at_step_2(tree: dict) -> list:
    import errno

    import torch.distributed as dist

    from megatron_taipan.checkpoint import saving

    write = saving.write_tensors

    def failing(path: Path, tensors: dict) -> tuple[int, str]:
        if dist.get_rank() == 1 and "step_00000002" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, tensors)

    saving.write_tensors = failing
    try:
        return runs([tree])
    finally:
        saving.write_tensors = write


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(tmp_path):
    prefix, trees = write_data(tmp_path / "data"), []
    for name, asynchronous in (("behind", True), ("waiting", False)):
        tree = tree_of(prefix, tmp_path / name, "2 data, stage 1", steps=12)
        tree["checkpoint"] |= {"save_every": 2, "asynchronous": asynchronous, "keep_last": None}
        trees.append(tree)
    assert launch(2, slow_writing, trees)[0] == [0, 0]
    first = tmp_path / "behind" / "step_00000002"
    events = [(record["event"], record["step"]) for record in records(tmp_path / "behind")]
    assert events.index(("step", 4)) < events.index(("save", 2))  # it learned on before the first was complete
    assert log(tmp_path / "waiting", "save")[0]["stall_s"] >= 0.3
    ours, theirs = everything(first), everything(tmp_path / "waiting" / "step_00000002")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert find_newest(tmp_path / "behind").path.name == "step_00000012"


def slow_writing(trees: list[dict]) -> list:
    """Runs like `runs`; the first file of a state takes until two more steps are logged, or 0.3 s where none can be."""
    from megatron_taipan.checkpoint import saving

    write = saving.write_tensors

    def slow(path: Path, tensors: dict) -> tuple[int, str]:
        time.sleep(0.3)
        directory, until = path.parents[2], time.monotonic() + 60
        if directory.name == "behind" and "step_00000002" in str(path):
            while steps_so_far(directory) < 4 and time.monotonic() < until:
                time.sleep(0.01)
        return write(path, tensors)

    saving.write_tensors = slow
    try:
        return runs(trees)
    finally:
        saving.write_tensors = write
