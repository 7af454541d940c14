"""Recall tokens against a loop over pairs of positions, their loss against perplexity's, and the program's table."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_taipan.data.indexed import IndexedWriter
from megatron_taipan.data.loader import build_dataset
from megatron_taipan.data_config import DataConfig, DataSource
from megatron_taipan.errors import UserError
from megatron_taipan.evaluation import chunked, recall_tokens
from megatron_taipan.evaluation.perplexity import score
from megatron_taipan.evaluation.recall_tokens import main, recall_distance, score_by_distance
from megatron_taipan.model.taipan import Taipan
from tests.checkpoint.test_weights import write_weights
from tests.inference.networks import VOCABULARY, small_config, small_model


@pytest.fixture
def dataset(tmp_path):
    """Documents of few different tokens, so that bigrams come again; EDGES' classes are all met."""
    rng = np.random.default_rng(0)
    with IndexedWriter(tmp_path / "data", np.uint16) as writer:
        for _ in range(40):
            writer.add_document(rng.integers(0, 6, rng.integers(1, 60)))
    data = DataConfig(train=[DataSource(prefix=str(tmp_path / "data"))], seq_len=48, valid_fraction=0)
    return build_dataset(data, "train", VOCABULARY)


def naive(tokens, labels, loss_mask, seq_idx):
    """The definition, pair by pair."""
    out = np.zeros(tokens.shape, np.int64)
    for row, here in np.ndindex(*tokens.shape):
        for there in range(here):
            if (
                loss_mask[row, here] > 0
                and loss_mask[row, there] > 0
                and seq_idx[row, here] == seq_idx[row, there]
                and tokens[row, here] == tokens[row, there]
                and labels[row, here] == labels[row, there]
            ):
                out[row, here] = here - there
    return out


@st.composite
def batches(draw):
    b, l, v = draw(st.integers(1, 3)), draw(st.integers(1, 24)), draw(st.sampled_from((1, 2, 4, 30)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    stored = rng.integers(0, v, (b, l + 1))
    borders = rng.random((b, l)) < draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))  # the label is another document's
    seq_idx = np.concatenate([np.zeros((b, 1)), borders[:, :-1].cumsum(1)], 1)
    arrays = (stored[:, :-1], stored[:, 1:], 1.0 - borders, seq_idx)
    kinds = (torch.int64, torch.int64, torch.float32, torch.int32)
    return [torch.tensor(array, dtype=kind) for array, kind in zip(arrays, kinds, strict=True)]


@settings(max_examples=200, deadline=None)
@given(batches())
def test_distances_are_those_of_a_loop_over_pairs(batch):
    assert recall_distance(*batch).tolist() == naive(*(x.numpy() for x in batch)).tolist()


def test_documents_that_are_not_masked_may_be_looked_up_but_not_across_the_label_of_another():
    tokens = torch.tensor([[1, 2, 1, 2, 1, 2]])
    labels = torch.tensor([[2, 1, 2, 1, 2, 1]])
    mask, one = torch.tensor([[1.0, 0, 1, 1, 1, 1]]), torch.zeros(1, 6, dtype=torch.int32)
    assert recall_distance(tokens, labels, mask, one).tolist() == [[0, 0, 2, 0, 2, 2]]


def test_largest_ids_do_not_run_into_each_other():
    top = 2**17 - 1
    tokens = torch.tensor([[top, 0, top, 0], [0, top, 0, 0]])
    labels = torch.tensor([[0, top, 0, 0], [top, 0, 0, 0]])
    distance = recall_distance(tokens, labels, torch.ones(2, 4), torch.zeros(2, 4, dtype=torch.int32))
    assert distance.tolist() == [[0, 0, 2, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize(("batch", "at_once"), [(1, 1 << 15), (4, 1 << 15), (4, 1)])
def test_classes_hold_the_losses_of_a_loop_and_sum_to_the_perplexity(dataset, batch, at_once, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", 7 * VOCABULARY)
    monkeypatch.setattr(recall_tokens, "AT_ONCE", at_once)
    model, edges = small_model("M S W A").train(), (2, 5, 20)
    nats, counts = [0.0] * 5, [0] * 5
    with torch.no_grad():
        model.eval()
        for index in range(9):
            sample = {name: values[None] for name, values in dataset[index].items()}
            distance = naive(*(sample[name].numpy() for name in ("tokens", "labels", "loss_mask", "seq_idx")))[0]
            logits = model(sample["tokens"], seq_idx=sample["seq_idx"]).logits[0]
            for place in sample["loss_mask"][0].nonzero()[:, 0].tolist():
                kind = 0 if distance[place] == 0 else 1 + sum(distance[place] > edge for edge in edges)
                nats[kind] += float(F.cross_entropy(logits[place], sample["labels"][0, place]))
                counts[kind] += 1
        model.train()
    found = score_by_distance(model, dataset, samples=9, batch=batch, edges=edges)
    assert model.training and list(found.tokens) == counts and min(counts) > 5
    assert found.nats == pytest.approx(nats, rel=1e-6)
    assert found.beyond(5) == (pytest.approx(nats[3] + nats[4], rel=1e-6), counts[3] + counts[4])
    whole = score(model, dataset, samples=9, batch=batch)
    assert found.total.tokens == whole.tokens and found.total.ce == pytest.approx(whole.ce, rel=1e-6)


def test_a_text_that_comes_twice_is_new_once_and_recall_at_its_own_distance_after(tmp_path):
    """Two halves of distinct tokens: everything after the first half is recall, at the distance of the half."""
    half = np.random.default_rng(1).permutation(VOCABULARY)[:20]
    with IndexedWriter(tmp_path / "data", np.uint16) as writer:
        for _ in range(4):
            writer.add_document(np.concatenate([half, half, half[:1]]))
    data = DataConfig(
        train=[DataSource(prefix=str(tmp_path / "data"))], seq_len=40, valid_fraction=0, one_document=True
    )
    found = score_by_distance(small_model("M"), build_dataset(data, "train", VOCABULARY), samples=1, edges=(19, 20))
    assert found.tokens == (20, 0, 20, 0)


@pytest.mark.parametrize("edges", [(0, 4), (4, 4), (5, 2), (-1,)])
def test_edges_that_do_not_ascend_are_refused(dataset, edges):
    with pytest.raises(UserError, match="ascend"):
        score_by_distance(small_model("M"), dataset, samples=1, edges=edges)


def test_the_program_prints_a_line_a_model_with_the_window_among_the_edges(tmp_path, dataset, capsys):
    prefix = dataset.sources[0].stream.reader.prefix
    models = {"hybrid": Taipan(small_config("M S"), seed=3), "recurrent": Taipan(small_config("M M"), seed=4)}
    for name, model in models.items():
        write_weights(tmp_path / name, model)
    arguments = [*(str(tmp_path / name) for name in models), "--data", prefix, "--seq-len", "48", "--samples", "5"]
    assert main(arguments) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["model", "all", "new", "1-6", "7-64", "65-512", "513-2048", "2049-4096", ">4096"]
    for line, (name, model) in zip(lines, models.items(), strict=True):
        label, *cells = re.split(r" {2,}", line)
        expected = score_by_distance(model, dataset, samples=5, edges=(6, 64, 512, 2048, 4096))
        assert label == str(tmp_path / name)
        everything = score(model, dataset, samples=5)
        assert cells[0] == f"{everything.ce:.4f} {everything.tokens:,}"
        assert cells[2] == f"{expected.nats[1] / expected.tokens[1]:.4f} {expected.tokens[1]:,}"
        assert cells[-1] == "- 0"
    assert main([*arguments, "--edges", "3", "9", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.split()[:6] == ["model", "all", "new", "1-3", "4-9", ">9"]
    assert all(f">{word}<" in (tmp_path / "out/recall_tokens.svg").read_text() for word in ("new", "1-3", "4-9"))
    assert main([*arguments, "--edges", "9", "3"]) == 2
    assert "9, 3" in capsys.readouterr().err
