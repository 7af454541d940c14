"""Contexts read in chunks against one pass of a whole float32 network, and the program's results."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from megatron_taipan.checkpoint import weights
from megatron_taipan.data.indexed import IndexedWriter
from megatron_taipan.data_config import DataConfig, DataSource
from megatron_taipan.evaluation.perplexity import main
from megatron_taipan.evaluation.perplexity_by_length import build_contexts, position_edges, score_contexts
from megatron_taipan.model.taipan import Taipan
from tests.checkpoint.test_weights import write_weights
from tests.inference.networks import VOCABULARY, small_config, small_model

LENGTH = 100  # beyond the windows of 6; its chunks below are shorter and longer than these


def write_data(path, lengths) -> str:
    rng = np.random.default_rng(0)
    with IndexedWriter(path, np.uint16) as writer:
        for length in lengths:
            writer.add_document(rng.integers(0, VOCABULARY, length))
    return str(path)


def contexts_of(prefix: str, length: int, kind: str = "auto"):
    data = DataConfig(train=[DataSource(prefix=prefix)], seq_len=8, valid_fraction=0)
    return build_contexts(data, "train", length, kind, VOCABULARY)


@pytest.fixture
def prefix(tmp_path) -> str:
    return write_data(tmp_path / "data", [260, 150, *[30] * 20])


@pytest.mark.parametrize("pattern", ["M M", "M S S", "W W", "A A", "M S W A"])
@pytest.mark.parametrize("chunk", [3, 33])
def test_chunks_score_as_one_whole_pass_does(prefix, pattern, chunk):
    model = small_model(pattern, torch.float32)
    contexts, kind = contexts_of(prefix, LENGTH)
    assert kind == "one" and len(contexts) == 3
    found = score_contexts(model, contexts, samples=3, first=16, batch=2, chunk=chunk)
    assert found.edges == (0, 16, 32, 64, 100)
    with torch.no_grad():
        rows = contexts.batch([0, 1, 2])
        logits = model(rows["tokens"]).logits
        losses = F.cross_entropy(logits.flatten(0, 1), rows["labels"].flatten(), reduction="none").view(3, LENGTH)
    parts = losses.double().split([16, 16, 32, 36], 1)
    assert found.tokens == (48, 48, 96, 108)
    assert found.nats == pytest.approx([float(part.sum()) for part in parts], rel=1e-5)
    assert found.total.ce == pytest.approx(float(losses.mean()), rel=1e-5)


def test_documents_in_a_row_see_each_other_and_their_borders_do_not_count(prefix):
    model = small_model("M A", torch.float32)
    contexts, kind = contexts_of(prefix, 200, "row")
    assert kind == "in a row"
    rows = contexts.batch([0, 1])
    assert int(rows["seq_idx"].max()) == 0 and 0 < int((rows["loss_mask"] == 0).sum())
    with torch.no_grad():
        losses = F.cross_entropy(model(rows["tokens"]).logits.mT, rows["labels"], reduction="none")
    wanted = float((losses * rows["loss_mask"]).sum() / rows["loss_mask"].sum())
    found = score_contexts(model, contexts, samples=2, first=200, chunk=64).total
    assert found.ce == pytest.approx(wanted, rel=1e-5) and found.tokens == int(rows["loss_mask"].sum())


def test_a_context_is_one_document_where_there_is_such_a_long_one(prefix):
    assert [contexts_of(prefix, length)[1] for length in (29, 259, 260)] == ["one", "one", "in a row"]


def test_the_parts_double_from_the_first_on():
    assert position_edges(1024, 8192) == (0, 1024, 2048, 4096, 8192)
    assert position_edges(64, 64) == (0, 64) and position_edges(64, 100) == (0, 64, 100)


def test_the_cache_of_one_chunk_is_all_that_is_kept(prefix, monkeypatch):
    """No pass is longer than the chunk, which is what bounds the memory."""
    model, seen = small_model("M S", torch.float32), []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    contexts, _ = contexts_of(prefix, LENGTH)
    score_contexts(model, contexts, samples=1, first=50, chunk=32)
    assert seen == [32, 32, 32, 4]


def test_the_program_compares_models_by_length(tmp_path, prefix, capsys):
    for name, pattern in (("one", "M"), ("two", "M A")):
        write_weights(tmp_path / name, Taipan(small_config(pattern), seed=3))
    arguments = [str(tmp_path / "one"), str(tmp_path / "two"), "--data", prefix, "--lengths", "16,64,128,2K"]
    assert main([*arguments, "--tokens", "200", "--training-length", "64", "--out", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out/perplexity.json").read_text())["rows"]
    assert [row["length"] for row in rows] == [16, 64, 128, 2048] * 2
    assert [row["contexts"] for row in rows[:3]] == [12, 3, 1] and rows[3]["perplexity"] is None
    assert "1010 tokens here" in rows[3]["note"]
    model = Taipan(small_config("M A"), seed=3)
    wanted = score_contexts(model, contexts_of(prefix, 64)[0], samples=3, first=16).total.ce
    assert rows[5]["cross entropy"] == pytest.approx(wanted, rel=1e-6)
    said = capsys.readouterr().out
    assert " 64 " in said and " 128* " in said and "in a row" not in said and said.count("tokens here") == 2
    parts = json.loads((tmp_path / "out/perplexity_by_position.json").read_text())["rows"]
    assert [part["below position"] for part in parts] == [16, 32, 64, 128] * 2
    for name in ("perplexity.svg", "perplexity_by_position.svg"):
        assert "training length 64" in (tmp_path / "out" / name).read_text()
    told = json.loads((tmp_path / "one/config.json").read_text())
    (tmp_path / "one/config.json").write_text(json.dumps(told | {"tokens_per_sample": 32}))  # as exports have it
    assert main([*arguments[:1], *arguments[2:], "--tokens", "200", "--out", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out/perplexity.json").read_text())["rows"]
    assert {row["training length"] for row in rows} == {32}


def test_each_model_is_opened_once(tmp_path, prefix, monkeypatch):
    """A folder that is written again meanwhile would be two models in one row."""
    opened, real = [], weights.open_export
    monkeypatch.setattr(weights, "open_export", lambda path: opened.append(path.name) or real(path))
    for name in ("one", "other"):
        write_weights(tmp_path / name, Taipan(small_config("M"), seed=2))
    models = [str(tmp_path / name) for name in ("one", "other")]
    assert main([*models, "--data", prefix, "--lengths", "8,16", "--samples", "1"]) == 0 and opened == ["one", "other"]


def test_a_lack_of_memory_is_a_row_not_the_end(tmp_path, prefix, capsys, monkeypatch):
    write_weights(tmp_path / "one", Taipan(small_config("A")))
    whole = Taipan.new_cache

    def too_much(self, batch, *rest):
        if batch == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(self, batch, *rest)

    monkeypatch.setattr(Taipan, "new_cache", too_much)
    arguments = [str(tmp_path / "one"), "--data", prefix, "--lengths", "32,64", "--tokens", "64"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].endswith("out of memory") and "one" in lines[1].split()[-1]


def test_without_lengths_the_table_is_kept_too(tmp_path, prefix):
    write_weights(tmp_path / "one", Taipan(small_config("M")))
    out = ["--out", str(tmp_path / "out")]
    assert main([str(tmp_path / "one"), "--data", prefix, "--seq-len", "32", "--samples", "2", *out]) == 0
    [row] = json.loads((tmp_path / "out/perplexity.json").read_text())["rows"]
    assert row["tokens"] <= 64 and row["perplexity"] > 1
