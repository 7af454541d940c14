"""Perplexity against torch's cross entropy on every document by itself, and the program's table."""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_taipan.data.indexed import IndexedWriter
from megatron_taipan.data.loader import build_dataset
from megatron_taipan.data.piece import RowPiece
from megatron_taipan.data_config import DataConfig, DataSource
from megatron_taipan.evaluation.perplexity import main, score
from megatron_taipan.evaluation.recall_tokens import score_by_distance
from megatron_taipan.model.taipan import Taipan
from tests.checkpoint.test_weights import write_weights
from tests.inference.networks import VOCABULARY, small_config, small_model


@pytest.fixture
def prefix(tmp_path) -> str:
    rng = np.random.default_rng(0)
    with IndexedWriter(tmp_path / "data", np.uint16) as writer:
        for _ in range(60):
            writer.add_document(rng.integers(0, VOCABULARY, rng.integers(1, 40)))
    return str(tmp_path / "data")


def dataset_of(prefix: str, seq_len: int = 32):
    return build_dataset(
        DataConfig(train=[DataSource(prefix=prefix)], seq_len=seq_len, valid_fraction=0), "train", VOCABULARY
    )


@pytest.mark.parametrize("batch", [1, 4])
def test_documents_are_scored_as_if_each_stood_alone(prefix, batch):
    model, dataset = small_model("M S W A"), dataset_of(prefix)
    total, count = 0.0, 0
    with torch.no_grad():
        for index in range(9):
            sample = dataset[index]
            for document in sample["seq_idx"].unique():
                rows = (sample["seq_idx"] == document).nonzero()[:, 0]
                counted = sample["loss_mask"][rows].bool()
                logits = model(sample["tokens"][rows][None]).logits[0]
                total += float(F.cross_entropy(logits[counted], sample["labels"][rows][counted], reduction="sum"))
                count += int(counted.sum())
    result = score(model, dataset, samples=9, batch=batch)
    assert result.tokens == count < 9 * 32
    assert result.ce == pytest.approx(total / count, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(total / count), rel=1e-5)


def test_a_random_gate_draws_by_the_sample_not_by_its_place_in_a_batch(prefix):
    model, dataset = small_model("M S S", gate={"noise": "random", "capacity": 0.5}), dataset_of(prefix)
    single, four = (score(model, dataset, samples=9, batch=batch).ce for batch in (1, 4))
    assert single == pytest.approx(four, rel=1e-6)
    split = [score_by_distance(model, dataset, samples=9, batch=batch).total.ce for batch in (1, 4)]
    assert split == pytest.approx([single] * 2, rel=1e-6)


def test_the_tokens_of_long_rows_are_all_counted():
    """More of them than float32 can count: 2^24 and one."""
    tokens = 2**24 + 1

    class Rows:
        piece = RowPiece()

        def __len__(self) -> int:
            return 1

        def batch(self, indices: list[int]) -> dict[str, torch.Tensor]:
            some = torch.zeros(1, dtype=torch.int64).expand(1, tokens)
            return {"tokens": some, "labels": some, "loss_mask": torch.ones(1, 1).expand(1, tokens), "seq_idx": some,
                    "sample": torch.tensor(indices)}  # fmt: skip

    class Model(torch.nn.Linear):
        place = None

        def forward(self, *_, **__) -> SimpleNamespace:
            return SimpleNamespace(ce_loss=torch.tensor(2.0 * tokens, dtype=torch.float64))

    found = score(Model(1, 1), Rows(), samples=1)
    assert found.tokens == tokens and found.ce == 2


def test_scoring_leaves_the_training_mode(prefix):
    model = small_model("M S").train()
    score(model, dataset_of(prefix), samples=2)
    assert model.training


def test_the_program_scores_a_folder_before_and_after(tmp_path, prefix, capsys):
    model = Taipan(small_config("M S"), seed=3)
    write_weights(tmp_path / "weights", model)
    arguments = [str(tmp_path / "weights"), "--data", prefix, "--seq-len", "32", "--samples", "5", "--untrained"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    figures = {line.split()[0]: float(re.split(r" +", line)[2]) for line in lines[1:]}
    dataset = dataset_of(prefix)
    assert figures[str(tmp_path / "weights")] == pytest.approx(score(model, dataset, samples=5).ce, abs=1e-4)
    fresh = Taipan(small_config("M S"), seed=0)
    assert figures["untrained"] == pytest.approx(score(fresh, dataset, samples=5).ce, abs=1e-4)


def test_an_exported_folder_needs_data_named(tmp_path, capsys):
    write_weights(tmp_path / "weights", Taipan(small_config("M")))
    assert main([str(tmp_path / "weights")]) == 2
    assert "--data PREFIX" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--batch", "--samples", "--seq-len"])
@pytest.mark.parametrize("value", ["0", "-2"])
def test_numbers_below_one_are_refused(tmp_path, prefix, capsys, option, value):
    write_weights(tmp_path / "weights", Taipan(small_config("M")))
    assert main([str(tmp_path / "weights"), "--data", prefix, "--seq-len", "32", option, value]) == 2
    assert f"{option}={value} must be at least 1" in capsys.readouterr().err


def test_a_second_model_with_a_smaller_vocabulary_than_the_data_is_refused(tmp_path, prefix, capsys):
    for name, size in (("large", 61), ("small", 9)):
        write_weights(tmp_path / name, Taipan(small_config("M", vocab_size=size)))
    assert main([str(tmp_path / "large"), str(tmp_path / "small"), "--data", prefix, "--seq-len", "32"]) == 2
    printed = capsys.readouterr()
    assert "the model's vocabulary has 9" in printed.err and printed.out.count("\n") == 2


def test_the_program_warns_of_gates_that_are_practically_off(tmp_path, prefix, capsys):
    model = Taipan(small_config("M S"), seed=3)
    arguments = ["--data", prefix, "--seq-len", "32", "--samples", "9"]
    for name, threshold in (("off", 1e9), ("half", 0.0)):
        model.layers[1].gate.threshold.fill_(threshold)
        write_weights(tmp_path / name, model)
    assert main([str(tmp_path / "off"), str(tmp_path / "half"), *arguments]) == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1 and f"{tmp_path / 'off'}: layers.1 selects 0.00% of the tokens" in said[0]
