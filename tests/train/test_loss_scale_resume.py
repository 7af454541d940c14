"""fp16's loss scale over a stop and a resume: overflowing steps are skipped, and the scale stands in the checkpoint."""

from pathlib import Path
from unittest import mock

from tests.distributed.launch import launch
from tests.train.runs import log, numbers, runs, with_options
from tests.train.test_fp16 import fp16_on_a_cpu
from tests.train.toy import toy_tree, write_data

FIRST_POWER = 18  # of the first scale: 2^18 times the gradient overflows within a few steps


def in_fp16(trees: list[dict]) -> list:
    from megatron_taipan.engine import build as engine

    usual = engine.deepspeed_config

    def with_scale(*arguments, **options):
        tree = usual(*arguments, **options)
        tree["fp16"]["initial_scale_power"] = FIRST_POWER
        return tree

    with fp16_on_a_cpu(), mock.patch.object(engine, "deepspeed_config", with_scale):
        return runs(trees)


def test_scale_and_skipped_steps_are_the_same_after_a_resume(tmp_path: Path):
    train = {"steps": 10, "global_batch": 4, "micro_batch": 2, "precision": "fp16", "eval_every": 0, "eval_samples": 2}
    base = toy_tree(write_data(tmp_path / "data"), tmp_path, parallel={"zero_stage": 1, "timeout_s": 60}, train=train)

    def tree(name: str, **options) -> dict:
        return with_options(base, checkpoint={"dir": str(tmp_path / name)}, train=options)

    # in processes of their own: in one process half-precision products may round differently
    assert launch(2, in_fp16, [tree("whole")])[0] == [0]
    assert launch(2, in_fp16, [tree("parts", stop_at=6)])[0] == [0]
    assert launch(2, in_fp16, [tree("parts")])[0] == [0]
    whole = log(tmp_path / "whole")
    skipped, scales = [r["skipped"] for r in whole], [r["loss_scale"] for r in whole]
    assert 1 <= sum(skipped) < 8 and skipped[-1] == 0, skipped
    assert scales[-1] < 2.0**FIRST_POWER and scales == sorted(scales, reverse=True)
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")  # the scale of every step included
    assert whole[-1]["ce"] < whole[0]["ce"]
