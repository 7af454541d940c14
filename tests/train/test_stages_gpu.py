"""A run in three stages through the real program on a GPU: CUDA graphs of every stage's shapes, fp16, offload, Muon."""

from pathlib import Path

import pytest
import yaml

from tests.distributed.launch import run_program
from tests.train.runs import log, numbers, records
from tests.train.test_stages import staged
from tests.train.toy import write_data

pytestmark = pytest.mark.gpu

CUT = 4  # inside the second stage
MEASURED = ("mfu", "memory_gb")


def stages_on_a_gpu(tmp_path: Path, name: str, train: dict, parallel: dict, optim: dict) -> Path:
    """Runs it, or goes on with it; its folder."""
    data = tmp_path / "data"
    if not data.exists():
        data.mkdir()
        write_data(data / "web"), write_data(data / "books", seed=1)
    tree = staged(str(data / "web"), str(data / "books"), tmp_path / name)
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
    ids=["graphs", "fp16", "muon", "offload", "zero3"],
)
def test_stopped_inside_a_stage_it_goes_on_bit_for_bit(tmp_path, train, parallel, optim):
    whole = stages_on_a_gpu(tmp_path, "whole", train, parallel, optim)
    stages_on_a_gpu(tmp_path, "parts", train | {"stop_at": CUT}, parallel, optim)
    parts = stages_on_a_gpu(tmp_path, "parts", train, parallel, optim)
    assert [record["step"] for record in log(parts, "start")] == [0, CUT]
    assert len(told(whole)) == 7 and told(parts) == told(whole)


def test_graphs_of_each_stages_shapes_compute_what_no_graph_does(tmp_path):
    graphs = stages_on_a_gpu(tmp_path, "graphs", {"precision": "bf16"}, {}, {})
    none = stages_on_a_gpu(tmp_path, "none", {"precision": "bf16", "cuda_graphs": False}, {}, {})
    said = [record for record in records(graphs) if "CUDA graphs" in str(record)]
    assert [record["event"] for record in said] == ["start", "stage", "stage"], said
    for one, two in zip(log(graphs), log(none), strict=True):
        assert one["ce"] == pytest.approx(two["ce"], rel=2e-3), one["step"]
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=2e-2), one["step"]
