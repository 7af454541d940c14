"""A run in three stages on a GPU: with CUDA graphs of every stage's shapes; and in deterministic mode, which has none,
stopped inside a stage and gone on with bit for bit, in bf16 and fp16, with Muon, offload and ZeRO-3.

test_stages_graphs.py does the first on a CPU, where a graph calls its layers.
"""

from pathlib import Path

import pytest
import yaml

from tests.distributed.launch import launch, run_program
from tests.train.replayed_stages import (
    PASSES,
    bf16_stages,
    check_close,
    check_replayed,
    check_said,
    groups_of,
    train_watched,
)
from tests.train.runs import log, numbers
from tests.train.test_stages import staged
from tests.train.toy import write_data

pytestmark = pytest.mark.gpu

CUT = 4  # inside the second stage
MEASURED = ("mfu", "memory_gb")


@pytest.fixture
def data(tmp_path) -> Path:
    write_data(tmp_path / "web"), write_data(tmp_path / "books", seed=1)
    return tmp_path


def on_the_gpu(tree: dict):
    """The passes of a training in a process of its own."""
    return launch(1, train_watched, tree, False, on_gpu=True)[0]


def test_each_stage_replays_graphs_of_its_own_shape_and_computes_what_no_graph_does(data):
    tree = bf16_stages(data, "graphs")
    passes, none = on_the_gpu(tree), on_the_gpu(bf16_stages(data, "none", cuda_graphs=False))
    check_replayed(passes)
    check_said(data / "graphs")
    assert passes.launches == 2 * groups_of(tree) * len(passes.replayed)  # forward and backward
    assert none.replayed == [] and none.launches == 0 and none.one_by_one == sum(PASSES, [])
    check_close(data / "graphs", data / "none")


def test_with_graphs_a_run_stopped_inside_a_stage_goes_on_nearly_as_if_it_was_not(data):
    """To rounding, not bit for bit: that is promised, and tested below, for deterministic mode."""
    check_replayed(on_the_gpu(bf16_stages(data, "whole")))
    check_replayed(on_the_gpu(bf16_stages(data, "parts", stop_at=CUT)), last=CUT)
    check_replayed(on_the_gpu(bf16_stages(data, "parts")), first=CUT)
    assert [record["step"] for record in log(data / "parts", "start")] == [0, CUT]
    check_said(data / "parts", starts=2)
    check_close(data / "parts", data / "whole")


def deterministic_stages(tmp_path: Path, name: str, train: dict, parallel: dict, optim: dict) -> Path:
    """Runs the program, or goes on with it; its folder."""
    tree = staged(str(tmp_path / "web"), str(tmp_path / "books"), tmp_path / name)
    for section, options in {"train": train | {"deterministic": True}, "parallel": parallel, "optim": optim}.items():
        tree[section] = tree.get(section, {}) | options
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    run_program(1, ["launch/pretrain.py", "--config", str(tmp_path / "config.yaml")], on_gpu=True).succeeded()
    return tmp_path / name


def told(folder: Path) -> list[dict]:
    return [{k: v for k, v in step if k not in MEASURED} for step in numbers(folder)]


@pytest.mark.parametrize(
    ("train", "parallel", "optim"),
    [
        ({"precision": "bf16"}, {}, {}),
        ({"precision": "fp16"}, {}, {}),
        ({"precision": "bf16"}, {}, {"name": "muon"}),
        ({"precision": "bf16"}, {"zero_stage": 2, "offload_optimizer": "cpu"}, {"ema_decay": None}),
        ({"precision": "bf16"}, {"zero_stage": 3}, {"ema_decay": None}),
    ],
    ids=["bf16", "fp16", "muon", "offload", "zero3"],
)
def test_in_deterministic_mode_a_run_stopped_inside_a_stage_goes_on_bit_for_bit(data, train, parallel, optim):
    """Layers run one by one here: this mode has no CUDA graphs."""
    whole = deterministic_stages(data, "whole", train, parallel, optim)
    deterministic_stages(data, "parts", train | {"stop_at": CUT}, parallel, optim)
    parts = deterministic_stages(data, "parts", train, parallel, optim)
    starts = [record["text"] for record in log(parts, "start")]
    assert all("layers run one by one" in text and ("Muon" in text) == ("name" in optim) for text in starts), starts
    assert [record["step"] for record in log(parts, "start")] == [0, CUT]
    assert len(told(whole)) == 7 and told(parts) == told(whole)
    # a step that fp16 skips leaves the weights as they are: some must have been taken on either side of the stop
    taken = [not record["skipped"] for record in log(whole)]
    assert any(taken[:CUT]) and any(taken[CUT:-1]), taken
    assert ("loss_scale" in log(whole)[0]) == (train["precision"] == "fp16")
