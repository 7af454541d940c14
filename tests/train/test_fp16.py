"""fp16's loss scaler. DeepSpeed and we refuse fp16 on a CPU; both are told otherwise here, for the test alone."""

from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.distributed.launch import launch
from tests.train.test_loop import log, numbers, runs, with_options
from tests.train.toy import toy_tree, write_data


@contextmanager
def fp16_on_cpu(first_scale_power: int):
    """Lets the engine train in fp16 on a CPU, with a first loss scale of 2^first_scale_power."""
    import torch
    from deepspeed.accelerator import get_accelerator

    from megatron_taipan.train import engine

    accelerator, config, cast = get_accelerator(), engine.deepspeed_config, engine.cast
    supported = accelerator.is_fp16_supported

    def with_scale(*arguments, **options):
        tree = config(*arguments, **options)
        tree["fp16"]["initial_scale_power"] = first_scale_power
        return tree

    accelerator.is_fp16_supported = lambda: True
    engine.deepspeed_config = with_scale
    engine.cast = lambda model, precision, device: cast(model, precision, torch.device("cuda"))
    try:
        yield
    finally:
        accelerator.is_fp16_supported, engine.deepspeed_config, engine.cast = supported, config, cast


def in_fp16(trees: list[dict], first_scale_power: int) -> list:
    with fp16_on_cpu(first_scale_power):
        return runs(trees)


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_steps_that_overflow_are_skipped_and_the_scale_survives_a_resume(tmp_path: Path, stage: int):
    """2^18 overflows in one of the first steps; the scale falls until the gradients fit, and stands in the checkpoint."""
    train = {"steps": 10, "global_batch": 4, "micro_batch": 2, "precision": "fp16", "eval_every": 0, "eval_samples": 2}
    base = toy_tree(
        write_data(tmp_path / "data"), tmp_path, parallel={"zero_stage": stage, "timeout_s": 60}, train=train
    )

    def tree(name: str, **options) -> dict:
        return with_options(base, checkpoint={"dir": str(tmp_path / name)}, train=options)

    # in processes of their own: in one process half-precision products may round differently
    assert launch(2, in_fp16, [tree("whole")], 18)[0] == [0]
    assert launch(2, in_fp16, [tree("parts", stop_at=6)], 18)[0] == [0]
    assert launch(2, in_fp16, [tree("parts")], 18)[0] == [0]
    whole = log(tmp_path / "whole")
    skipped = [record["skipped"] for record in whole]
    assert 1 <= sum(skipped) < 8 and skipped[-1] == 0, skipped
    scales = [record["loss_scale"] for record in whole]
    assert scales[-1] < 2.0**18 and scales == sorted(scales, reverse=True)
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")  # the scale of every step included
    losses = [record["ce"] for record in whole]
    assert losses[-1] < losses[0]
