"""A run in three stages, watched: which of its passes through the layers were replays of CUDA graphs."""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megatron_taipan.config_loading import make_config
from megatron_taipan.engine import build
from megatron_taipan.model.taipan import Taipan
from tests.model.replays import Passes, watched_passes
from tests.model.test_graphs import unrecorded
from tests.train.runs import log, runs
from tests.train.test_stages import staged

# of `staged`: micro-batches of its 3 + 2 + 2 steps, by (rows, tokens a row)
SHAPES = [(2, 32), (1, 64), (6, 32)]
PASSES = [4 * [SHAPES[0]]] * 3 + [5 * [SHAPES[1]]] * 2 + [1 * [SHAPES[2]]] * 2
# Graphs hold the launches that there are without them. What is left is the order of sums by atomics; these limits are
# about three times what it costs to move every gradient at random by up to a bf16 rounding (2^-8), on a CPU. There a
# graph that replays a stale gate, step, row number or document border is at least twice beyond one of them.
LOSS, NORM = 3e-4, 1e-2


def bf16_stages(tmp_path: Path, name: str, **train) -> dict:
    tree = staged(str(tmp_path / "web"), str(tmp_path / "books"), tmp_path / name)
    tree["train"] |= {"precision": "bf16", **train}
    return tree


def train_watched(tree: dict, pretended: bool) -> Passes:
    """Trains in this process.

    Args:
        pretended: on a CPU, where graphs are what calls their layers; else on this process's GPU.
    """
    with watched_passes() as passes:
        if not pretended:
            assert runs([tree], torch.device("cuda", torch.cuda.current_device())) == [0]
            return passes
        from megatron_taipan.train import start

        capture = build.capture_graphs

        def as_on_a_gpu(model, config, device, stack):
            return capture(model, config, SimpleNamespace(type="cuda"), stack)

        with (
            mock.patch.object(torch.cuda, "make_graphed_callables", unrecorded),
            mock.patch.object(Taipan, "graphable", True),
            mock.patch.object(build, "capture_graphs", as_on_a_gpu),
            mock.patch.object(start, "capture_graphs", as_on_a_gpu),
        ):
            assert runs([tree]) == [0]
    return passes


def check_replayed(passes: Passes, first: int = 0, last: int = len(PASSES)) -> None:
    """Every pass of the steps from `first` to `last` was a replay, of a graph of its own stage's shape."""
    wanted = sum(PASSES[first:last], [])
    assert passes.one_by_one == [] and passes.replayed == wanted, passes
    assert passes.captured == [shape for shape in SHAPES if shape in wanted], passes


def check_said(folder: Path, starts: int = 1) -> None:
    """The log says at each start, and where a stage begins, that the layers run as CUDA graphs."""
    said = [r["event"] for event in ("start", "stage") for r in log(folder, event) if "CUDA graphs" in r["text"]]
    assert said == ["start"] * starts + ["stage"] * 2, said


def check_close(ours: Path, theirs: Path) -> None:
    """Losses and norms of every step; losses of no two steps are equal, as they would be if nothing were trained."""
    pairs = list(zip(log(ours), log(theirs), strict=True))
    assert len(pairs) == len(PASSES) and len({two["ce"] for _, two in pairs}) == len(PASSES)
    for one, two in pairs:
        assert one["ce"] == pytest.approx(two["ce"], rel=LOSS), one["step"]
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=NORM), one["step"]


def groups_of(tree: dict) -> int:
    """CUDA graphs of a forward pass."""
    from megatron_taipan.model.graphs import split_where_graphs_end

    with torch.device("meta"):
        return len(split_where_graphs_end(list(Taipan(make_config(tree).model).layers)))
