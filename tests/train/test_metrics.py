"""What a run reports of its speed."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_taipan.checkpoint.metadata import Progress
from megatron_taipan.config_loading import make_config
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.train.metrics import Metrics
from megatron_taipan.train.step import StepResult
from tests.train.toy import toy_tree

WIDE = {"d_model": 128, "d_ff": 256, "vocab_size": 512, "attention": {"n_heads": 2}}


@pytest.mark.parametrize("pattern", ["A A", "W A W"])
def test_mfu_is_what_torch_counts_of_a_training_step(tmp_path, monkeypatch, pattern):
    """Rows are short, so that matrix products with weights are nearly all of it."""
    tree = toy_tree("unused", tmp_path, log={"peak_tflops": 2.0, "tensorboard": False})
    config = make_config(tree | {"model": {**tree["model"], **WIDE, "pattern": pattern}})
    model = Taipan(config.model, seed=0)
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(tokens, labels=tokens).loss.backward()
    per_token = counter.get_total_flops() / tokens.numel()

    flops = model.num_flops_per_token(tokens.shape[1])
    with Metrics(config, Progress(), flops_per_token=flops, devices=4, writes=True) as metrics:
        monkeypatch.setattr(metrics, "seconds", lambda: 0.5)
        step = StepResult(1.0, 1.0, 0.0, {}, grad_norm=1.0, skipped=False, requests=[])
        metrics.after_step(1, step, lr=0.1, tokens=1000, data_wait_s=0.0)
    (record,) = [r for r in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()) if r["event"] == "step"]
    assert record["tokens_per_s"] == 2000
    assert record["mfu"] == pytest.approx(2000 * per_token / (4 * 2.0e12), rel=0.1)


def test_a_steps_record_has_the_stall_since_the_step_before(tmp_path):
    config = make_config(toy_tree("unused", tmp_path, log={"tensorboard": False}))
    with Metrics(config, Progress(), flops_per_token=1.0, devices=1, writes=True) as metrics:
        for step, stalls in ((1, []), (2, [0.25, 0.5]), (3, []), (4, [0.125])):
            for seconds in stalls:
                metrics.stalled(seconds)
            result = StepResult(1.0, 1.0, 0.0, {}, grad_norm=1.0, skipped=False, requests=[])
            metrics.after_step(step, result, lr=0.1, tokens=8, data_wait_s=0.0)
    records = [r for r in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()) if r["event"] == "step"]
    assert [record["checkpoint_stall_s"] for record in records] == [0, 0.75, 0, 0.125]
