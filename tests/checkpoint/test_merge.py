"""A checkpoint of any ZeRO stage and tensor size, merged, is the model that the trainer evaluated when it saved."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from megatron_taipan.checkpoint.merge import load_state, open_state
from megatron_taipan.data.loader import build_dataset
from megatron_taipan.errors import UserError
from megatron_taipan.evaluation.perplexity import score
from megatron_taipan.inference.loading import load_model
from megatron_taipan.parallel.layout import describe
from tests.distributed.launch import run_program
from tests.train.toy import toy_tree, write_data


def trained(folder: Path, stage: int, tensor: int, precision: str = "fp32") -> Path:
    """Runs the real program on two processes; returns the run's folder."""
    sections = {
        "parallel": {"zero_stage": stage, "tensor": tensor},
        "train": {"steps": 3, "precision": precision, "eval_samples": 12},
    }
    tree = toy_tree(write_data(folder / "data"), folder / "run", **sections)
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    run_program(2, ["launch/pretrain.py", "--config", str(folder / "config.yaml")]).succeeded()
    return folder / "run"


@pytest.mark.parametrize(
    ("stage", "tensor"),
    [
        (1, 1),
        (3, 1),
        (1, 2),
        pytest.param(0, 2, marks=pytest.mark.slow),
        pytest.param(2, 1, marks=pytest.mark.slow),
        pytest.param(3, 2, marks=pytest.mark.slow),
    ],
)
def test_merged_model_scores_what_the_trainer_measured(tmp_path, stage, tensor):
    run = trained(tmp_path, stage, tensor)
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    measured = [record["ce"] for record in records if record["event"] == "valid"]
    assert measured[-1] < measured[0] - 0.05  # it learned, so initial weights cannot pass for the merged ones
    model, _, config = load_model(run)
    dataset = build_dataset(config.data, "valid", config.model.vocab_size)
    assert score(model, dataset, samples=12, batch=4).ce == pytest.approx(measured[-1], rel=2e-6)


def test_bf16_run_gives_its_float32_masters(tmp_path):
    run = trained(tmp_path, 1, 1, "bf16")
    state = open_state(run)
    assert state.step == 3
    merged, table = load_state(run), describe(state.config.model)
    assert list(merged) == [*table, "layers.1.gate.threshold"]
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        assert name not in table or tuple(tensor.shape) == table[name].shape
    matrix = merged["layers.0.mixer.in_proj_z"]
    assert (matrix.bfloat16().float() != matrix).any()  # finer than what bf16 holds
    # cast down again they are what the trainer computed with
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    measured = [record["ce"] for record in records if record["event"] == "valid"]
    model, _, config = load_model(run, torch.bfloat16)
    dataset = build_dataset(config.data, "valid", config.model.vocab_size)
    assert score(model, dataset, samples=12, batch=2).ce == pytest.approx(measured[-1], rel=1e-3)

    largest = max((state.path / "state").iterdir(), key=lambda file: file.stat().st_size)
    largest.unlink()
    with pytest.raises(UserError, match=f"{largest.name} is missing"):
        open_state(state.path)


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint"):
        open_state(tmp_path)
