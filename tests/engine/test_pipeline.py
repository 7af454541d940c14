"""Pipelines train as one process does, wherever the gates stand and whatever is computed again."""

import pytest

from tests.distributed.launch import launch
from tests.engine.test_protocol import unfulfilled
from tests.train.runs import log, runs
from tests.train.toy import toy_tree, write_data


def runs_of_a_staged_engine(trees: list[dict]) -> list:
    """`runs`, whose engines are asked for all that a StagedEngine has."""
    from megatron_taipan.engine.pipeline import StagedEngine
    from megatron_taipan.train import start

    build_engine = start.build_engine

    def asked(*args):
        engine = build_engine(*args)
        assert isinstance(engine, StagedEngine) and not unfulfilled(engine, StagedEngine)
        return engine

    start.build_engine = asked
    return runs(trees)


@pytest.mark.parametrize(
    "pattern, parallel",
    [
        ("M S | A | M", {"pipeline": 3}),  # the gradient of the first stage's budget loss passes through the second
        ("M | S M | S A", {"pipeline": 3, "recompute": "full"}),
        ("M S | M A", {"pipeline": 2, "recompute": "selective"}),
    ],
    ids=["gate first", "gate in the middle", "selective"],
)
def test_pipelines_train_as_one_process(tmp_path, pattern, parallel):
    prefix = write_data(tmp_path / "data")

    def tree(name: str, parallel: dict) -> dict:
        train = {"steps": 3, "micro_batch": 2, "global_batch": 4, "eval_every": 1, "eval_samples": 5}
        return toy_tree(prefix, tmp_path / name, model=model | {"pattern": pattern}, parallel=parallel, train=train)

    model = toy_tree(prefix, "unused")["model"]
    assert launch(1, runs, [tree("one", {"zero_stage": 0})]) == [[0]]
    assert launch(parallel["pipeline"], runs_of_a_staged_engine, [tree("stages", parallel)])[0] == [0]
    for ours, truth in zip(log(tmp_path / "stages"), log(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(truth["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(truth["grad_norm"], rel=1e-4)
    # of the untrained network, whose gates are equal: the last micro-batch is half full
    ours, truth = (log(tmp_path / name, "valid")[0] for name in ("stages", "one"))
    fields = [name for name in truth if name.startswith("layers.")]
    assert fields and [ours[name] for name in fields] == pytest.approx([truth[name] for name in fields], rel=1e-6)
