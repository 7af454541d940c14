"""What a run saves, and says, when its loss or its parameters are no longer finite."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_taipan.checkpoint import folder
from megatron_taipan.checkpoint.verification import newest_sound
from tests.checkpoint.folders import rehash
from tests.checkpoints.made import memory_state, write_checkpoint
from tests.distributed.launch import launch
from tests.train.runs import log, runs
from tests.train.test_survival import poisoned
from tests.train.toy import toy_tree, write_data


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    return write_data(tmp_path_factory.mktemp("data") / "text")


def broken(trees: list[dict], at: int, kind: str, rank: int) -> list:
    """Runs like `runs`, but the update of step `at` leaves a value of rank `rank` that is not finite."""
    import torch.distributed as dist

    from megatron_taipan.engine.state_shards import held_shards, spread_masters
    from megatron_taipan.train import loop

    train_step = loop.train_step

    def breaking(engine, batches, *, step, groups, **kwargs):
        result = train_step(engine, batches, step=step, groups=groups, **kwargs)
        if step == at - 1:
            if dist.get_rank() == rank:
                held_shards(engine, groups.zero_rank)[-1].tensor(kind)[-1] = float("nan" if kind == "master" else "inf")
            spread_masters(engine)
        return result

    loop.train_step = breaking
    try:
        return runs(trees)
    finally:
        loop.train_step = train_step


def test_parameters_that_are_not_finite_between_saves(tmp_path, prefix):
    """The steps that were not finite are counted, and there is nothing new that could be saved."""
    tree = toy_tree(
        prefix, tmp_path / "run", train={"steps": 9, "max_skipped": 3, "global_batch": 4}, checkpoint={"save_every": 2}
    )
    for results in launch(2, broken, [tree | {"checkpoint": tree["checkpoint"] | {"save_every": 4}}], 5, "master", 1):
        assert "at step 8" in results[0] or "3 steps in a row (train.max_skipped), from step 6 on" in results[0]
        assert "step_00000004 is sound (complete, every value finite)" in results[0]
    assert [path.name for path in folder.checkpoints(tmp_path / "run")] == ["step_00000004"]


@pytest.mark.parametrize("zero_stage", [1, 3])
def test_a_state_that_is_not_finite_never_pushes_out_the_last_sound_one(tmp_path, prefix, zero_stage):
    tree = toy_tree(
        prefix, tmp_path / "run", parallel={"zero_stage": zero_stage},
        train={"steps": 9, "max_skipped": 3, "global_batch": 4}, checkpoint={"save_every": 1, "keep_last": 1},
    )  # fmt: skip
    for results in launch(2, broken, [tree], 4, "master", 1):
        assert results[0].startswith("at step 4 a parameter or a moment of the optimizer is not finite")
        assert f"{tmp_path / 'run' / 'step_00000003'} is sound (complete, every value finite)" in results[0]
    assert [path.name for path in folder.checkpoints(tmp_path / "run")] == ["step_00000003"]
    assert launch(2, runs, [tree]) == [[0], [0]]
    assert len(folder.checkpoints(tmp_path / "run")) == 1
    assert log(tmp_path / "run")[-1]["step"] == 9 and log(tmp_path / "run")[-1]["ce"] is not None


def test_a_moment_that_is_not_finite_ends_the_run_with_an_error_and_not_with_a_checkpoint(tmp_path, prefix):
    """Its loss is finite: the parameter of an infinite second moment only stands still."""
    tree = toy_tree(prefix, tmp_path / "run", train={"steps": 4, "global_batch": 4}, checkpoint={"save_every": 2})
    for results in launch(2, broken, [tree], 3, "exp_avg_sq", 0):
        assert results[0].startswith("at step 4 a parameter or a moment of the optimizer is not finite, which no")
        assert "step_00000002 is sound" in results[0]


def test_without_a_sound_checkpoint_the_message_says_so(tmp_path, prefix):
    tree = toy_tree(prefix, tmp_path / "run", train={"steps": 9, "max_skipped": 3}, checkpoint={"save_every": 1})
    for results in launch(2, poisoned, [tree], [0, 1, 2]):
        assert "from step 1 on; no checkpoint in" in results[0] and "is sound: start again" in results[0]
    assert folder.checkpoints(tmp_path / "run") == []


def test_over_the_border_of_two_stages_the_message_has_the_first_step(tmp_path, prefix):
    tree = toy_tree(prefix, tmp_path / "run", train={"steps": 7, "max_skipped": 3}, checkpoint={"save_every": 1})
    tree["stages"] = [{"steps": 3}, {}]
    for results in launch(2, poisoned, [tree], [2, 3, 4]):
        assert "3 steps in a row (train.max_skipped), from step 3 on" in results[0]
        assert "step_00000003 is sound" in results[0]


def made(run: Path, step: int, *, bad: float | None = None, name: str = "embedding.weight|master") -> Path:
    """A complete checkpoint of a step, with a value in it."""
    state = memory_state()
    path = write_checkpoint(run / "made", state.config, state.load)
    file = path / "state" / "rank_00000.safetensors"
    tensors = load_file(file)
    if bad is not None:
        tensors[name][-1] = bad
    save_file(tensors, file)
    metadata = json.loads((path / folder.METADATA).read_text())
    (path / folder.METADATA).write_text(json.dumps(metadata | {"progress": metadata["progress"] | {"step": step}}))
    rehash(path)
    shutil.move(path, run / folder.folder_name(step))
    return run / folder.folder_name(step)


def test_the_newest_sound_checkpoint_is_complete_and_finite(tmp_path):
    good = made(tmp_path, 1)
    made(tmp_path, 2, bad=float("nan"))
    made(tmp_path, 3, bad=float("inf"), name="layers.0.norm.weight|exp_avg_sq")
    cut = made(tmp_path, 4)
    (cut / folder.CONFIG).unlink()
    found = newest_sound(tmp_path)
    assert found.path == good
    assert [reason.partition(": ")[::2] for reason in found.passed_over] == [
        ("step_00000004", "config.yaml is missing"),
        ("step_00000003", "layers.0.norm.weight (exp_avg_sq) in state/rank_00000.safetensors is not finite"),
        ("step_00000002", "embedding.weight (master) in state/rank_00000.safetensors is not finite"),
    ]
    shutil.rmtree(good)
    assert newest_sound(tmp_path) is None
    made(tmp_path, 9, bad=torch.finfo(torch.float32).max)
    assert newest_sound(tmp_path).path.name == "step_00000009"
