"""The training state moves between layouts: bit for bit where nothing is trained, and training goes on the same."""

import json
import os
import time
from pathlib import Path

import pytest
import torch

from megatron_taipan.checkpoint.folder import find_newest, read_metadata
from megatron_taipan.checkpoint.pieces import KINDS
from megatron_taipan.checkpoint.reader import INDEX, StateReader
from megatron_taipan.config import load_config, make_config
from megatron_taipan.errors import UserError
from tests.distributed.launch import launch
from tests.train.test_loop import log, runs
from tests.train.toy import toy_tree, write_data

# processes, and the section `parallel`
LAYOUTS = {
    "alone": (1, {"zero_stage": 1}),
    "alone, stage 0": (1, {"zero_stage": 0}),
    "2 data, stage 1": (2, {"zero_stage": 1}),
    "2 data, stage 3": (2, {"zero_stage": 3}),
    "2 tensor, stage 1": (2, {"zero_stage": 1, "tensor": 2}),
    "2 tensor, stage 3": (2, {"zero_stage": 3, "tensor": 2}),
    "2 stages": (2, {"zero_stage": 1, "pipeline": 2}),
    "2 tensor x 2 data, stage 2": (4, {"zero_stage": 2, "tensor": 2}),
    "4 tensor, sequence": (4, {"zero_stage": 1, "tensor": 4, "sequence": True}),
}


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    return write_data(tmp_path_factory.mktemp("data") / "data")


def tree_of(prefix: str, directory: Path, layout: str, **train) -> dict:
    """A run in one of the layouts; heads and groups are such that B, C, k and v are shared by several ranks."""
    processes, parallel = LAYOUTS[layout]
    train = {
        "steps": 40,
        "global_batch": 8,
        "micro_batch": 2,
        "precision": "fp32",
        "eval_every": 0,
        "eval_samples": 2,
    } | train
    tree = toy_tree(prefix, directory, parallel=parallel | {"timeout_s": 60}, train=train)
    tree["model"]["attention"] = {"n_heads": 4, "n_kv_heads": 1, "window": 12}
    tree["optim"]["lr"] = 1e-3
    return tree


def convert(tree: dict, source: str) -> None:
    """Loads a checkpoint in this process group's layout and saves it again, untrained."""
    import torch.distributed as dist

    from megatron_taipan.checkpoint import state
    from megatron_taipan.ops.dispatch import pick_ops
    from megatron_taipan.parallel.groups import build_groups
    from megatron_taipan.train.engine import build_engine
    from megatron_taipan.train.loop import build_model

    config = make_config(tree)
    p = config.parallel
    groups = build_groups(
        world_size=dist.get_world_size(), rank=dist.get_rank(), tensor=p.tensor, pipeline=p.pipeline,
        sequence_parallel=p.sequence,
    )  # fmt: skip
    config.train.seed += 1  # other initial weights: what is not loaded shows
    engine = build_engine(build_model(config, groups, pick_ops()), config, groups, torch.device("cpu"))
    config.train.seed -= 1
    identity = read_metadata(Path(source))["identity"]
    progress = state.load(engine, Path(source), config=config, identity=identity, groups=groups)
    saving = state.Saving(
        engine, Path(config.checkpoint.dir), progress, config=config, metadata={"identity": identity}, groups=groups
    )
    saving.finish()


def everything(path: Path) -> dict[tuple[str, str], torch.Tensor]:
    reader = StateReader(path, load_config(path / "config.yaml").model)
    tensors = {(name, kind): reader.full(name, kind).clone() for name in reader.table for kind in KINDS}
    return tensors | {(name, "buffer"): reader.buffer(name) for name in reader.buffers}


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "2 data, stage 1"])
def test_there_and_back_is_bit_equal(tmp_path, prefix, layout):
    home = "2 data, stage 1"
    start = tree_of(prefix, tmp_path / "start", home, steps=2)
    assert launch(2, runs, [start])[0] == [0]
    source = find_newest(tmp_path / "start").path
    launch(LAYOUTS[layout][0], convert, tree_of(prefix, tmp_path / "there", layout), str(source))
    there = find_newest(tmp_path / "there").path
    launch(2, convert, tree_of(prefix, tmp_path / "back", home), str(there))
    back = find_newest(tmp_path / "back").path
    before = everything(source)
    assert max(tensor.abs().max() for (_, kind), tensor in before.items() if kind == "exp_avg") > 0
    for path in (there, back):
        after = everything(path)
        assert after.keys() == before.keys()
        for key, tensor in before.items():
            assert torch.equal(after[key], tensor), (path.parent.name, key)
        index = json.loads((path / INDEX).read_text())
        assert index["optimizer_step"] == 2
        # each element is written once
        total = sum(count for pieces in index["parameters"].values() for *_, count in pieces)
        padded = sum(
            torch.Size(spec.shape).numel() for spec in StateReader(path, make_config(start).model).table.values()
        )
        assert total == padded


def test_a_run_that_changes_its_layout_at_every_stop_learns_the_same(tmp_path, prefix):
    chain = list(LAYOUTS)
    for number, layout in enumerate(chain, start=1):
        tree = tree_of(prefix, tmp_path / "moving", layout, stop_at=2 * number)
        assert launch(LAYOUTS[layout][0], runs, [tree])[0] == [0], layout
    assert launch(1, runs, [tree_of(prefix, tmp_path / "still", "alone", stop_at=2 * len(chain))])[0] == [0]
    still, moving = (log(tmp_path / name) for name in ("still", "moving"))
    assert [record["step"] for record in moving] == list(range(1, 2 * len(chain) + 1))
    for ours, theirs in zip(moving, still, strict=True):
        assert ours["ce"] == pytest.approx(theirs["ce"], rel=1e-5), ours["step"]
        assert ours["lr"] == theirs["lr"]


def test_missing_elements_are_an_error(tmp_path, prefix):
    assert launch(2, runs, [tree_of(prefix, tmp_path, "2 data, stage 1", steps=1)])[0] == [0]
    path = find_newest(tmp_path).path
    index = json.loads((path / INDEX).read_text())
    name = max(index["parameters"], key=lambda n: len(index["parameters"][n]))
    index["parameters"][name].pop()
    (path / INDEX).write_text(json.dumps(index))
    reader = StateReader(path, load_config(path / "config.yaml").model)
    with pytest.raises(UserError, match=f"{name} .* of .* elements"):
        reader.full(name, "master")


def test_a_full_disk_on_one_rank_keeps_the_run_and_the_checkpoint_before(tmp_path, prefix):
    tree = tree_of(prefix, tmp_path / "run", "2 data, stage 1", steps=4) | {
        "checkpoint": {"dir": str(tmp_path / "run"), "save_every": 1}
    }
    for results in launch(2, full_disk_at_step_2, tree):
        assert results == [0]
    names = sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir())
    assert names == ["step_00000001", "step_00000003", "step_00000004"]
    (alarm,) = log(tmp_path / "run", "alarm")
    assert "step 2: " in alarm["text"] and "rank 1: No space left on device" in alarm["text"]


def full_disk_at_step_2(tree: dict) -> list:
    import errno

    import torch.distributed as dist

    from megatron_taipan.checkpoint import state

    write = state.write_tensors

    def failing(path: Path, tensors: dict) -> tuple[int, str]:
        if dist.get_rank() == 1 and "step_00000002" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, tensors)

    state.write_tensors = failing
    try:
        return runs([tree])
    finally:
        state.write_tensors = write


def test_training_goes_on_while_a_checkpoint_is_written_and_does_not_change_it(tmp_path, prefix):
    trees = []
    for name, asynchronous in (("behind", True), ("waiting", False)):
        tree = tree_of(prefix, tmp_path / name, "2 data, stage 1", steps=12)
        tree["checkpoint"] |= {"save_every": 2, "asynchronous": asynchronous, "keep_last": None}
        trees.append(tree)
    assert launch(2, slow_writing, trees)[0] == [0, 0]
    first = tmp_path / "behind" / "step_00000002"
    events = [(record["event"], record["step"]) for record in log_all(tmp_path / "behind")]
    assert events.index(("step", 4)) < events.index(("save", 2))  # it learned on before the first was complete
    save = log(tmp_path / "behind", "save")[0]
    assert save["stall_s"] < save["write_s"]
    assert log(tmp_path / "waiting", "save")[0]["stall_s"] >= 0.3
    ours, theirs = everything(first), everything(tmp_path / "waiting" / "step_00000002")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert find_newest(tmp_path / "behind").path.name == "step_00000012"


def log_all(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def slow_writing(trees: list[dict]) -> list:
    from megatron_taipan.checkpoint import state

    write = state.write_tensors

    def slow(path: Path, tensors: dict) -> tuple[int, str]:
        time.sleep(0.3)
        return write(path, tensors)

    state.write_tensors = slow
    try:
        return runs(trees)
    finally:
        state.write_tensors = write
