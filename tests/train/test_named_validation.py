"""Validation sets by name and losses by position, which other programs find as well; in every layout the same."""

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_taipan.config_errors import ConfigError
from megatron_taipan.config_loading import make_config
from megatron_taipan.config_text import dump_config
from megatron_taipan.data.loader import build_dataset
from megatron_taipan.data_config import DataConfig, DataSource
from megatron_taipan.evaluation.perplexity import read_batches, score
from megatron_taipan.inference.loading import load_model
from megatron_taipan.plain_yaml import parse_yaml
from megatron_taipan.train.evaluate import Evaluation, mean_evaluation
from megatron_taipan.train.positions import part_names, positions
from tests.distributed.launch import launch
from tests.train.runs import log, runs
from tests.train.toy import VOCAB, toy_tree, write_data


def test_each_set_has_the_loss_that_the_perplexity_program_finds(tmp_path):
    train, wiki, code = (write_data(tmp_path / name, seed=seed) for seed, name in enumerate(("train", "wiki", "code")))
    tree = toy_tree(train, tmp_path / "run", train={"steps": 2, "eval_samples": 5})
    tree["data"] |= {"valid": {"wiki": wiki, "code": [code]}, "seq_len": 24}
    assert launch(1, runs, [tree])[0] == [0]
    record = log(tmp_path / "run", "valid")[-1]
    model, _, _ = load_model(tmp_path / "run")
    found, gates = {}, {}
    for name, prefix in (("wiki", wiki), ("code", code)):
        data = DataConfig(train=train, valid=[DataSource(prefix=prefix)], seq_len=24)
        dataset = build_dataset(data, "valid", VOCAB)
        found[name] = score(model, dataset, samples=5)
        rows = dataset.batch(list(range(5)))
        with torch.no_grad():
            out = model.eval()(rows["tokens"], seq_idx=rows["seq_idx"], samples=rows["sample"])
        gates[name] = model.named_metrics(out)
        assert record["sets"][name]["ce"] == pytest.approx(found[name].ce, rel=1e-5)
        assert record["sets"][name]["tokens"] == found[name].tokens
    assert found["wiki"].ce != found["code"].ce
    tokens = sum(part.tokens for part in found.values())
    whole = sum(part.ce * part.tokens for part in found.values()) / tokens
    assert record["ce"] == pytest.approx(whole, rel=1e-5) and record["tokens"] == tokens
    assert record["perplexity"] == pytest.approx(math.exp(whole), rel=1e-5)
    for metric in ("layers.1.selected", "layers.1.alpha"):  # of five rows in micro-batches of two, two and one
        shares = [float(gates[name][metric]) * part.tokens for name, part in found.items()]
        assert record[metric] == pytest.approx(sum(shares) / tokens, rel=1e-5)


def losses_by_position(model, dataset, samples: int, names: list[str]) -> dict[str, float]:
    """Token by token, from logits; the position counts from the last token whose document is another."""
    found: dict[str, list[float]] = {name: [] for name in names}
    with torch.no_grad():
        for batch in read_batches(dataset, samples, 1):
            logits = model(batch["tokens"], seq_idx=batch["seq_idx"], samples=batch["sample"]).logits[0]
            position, before = 0, None
            for at, document in enumerate(batch["seq_idx"][0].tolist()):
                position, before = (position + 1 if document == before else 0), document
                if batch["loss_mask"][0, at]:
                    name = next(n for n in names if int(n.split("-")[0]) <= position <= int(n.split("-")[1]))
                    found[name].append(F.cross_entropy(logits[at], batch["labels"][0, at]).item())
    return {name: math.fsum(losses) / len(losses) for name, losses in found.items() if losses}


def test_losses_by_position_are_those_of_single_tokens_in_every_layout(tmp_path):
    wiki, code = (write_data(tmp_path / name, seed=seed) for seed, name in enumerate(("wiki", "code")))

    def tree(name: str, **sections: dict) -> dict:
        base = toy_tree(wiki, tmp_path / name, train={"steps": 1, "eval_samples": 5} | sections.pop("train", {}))
        base["data"] |= {"valid": {"wiki": wiki, "code": code}, "seq_len": 50} | sections.pop("data", {})
        return base | {"parallel": base["parallel"] | sections.pop("parallel", {})}

    one = [tree("one"), tree("whole rows", data={"mask_documents": False})]
    two = [
        tree("data", train={"micro_batch": 1}),
        tree("tensor", parallel={"tensor": 2}),
        tree("pipeline", parallel={"pipeline": 2}),
    ]
    assert launch(1, runs, one)[0] == [0, 0]
    assert launch(2, runs, two)[0] == [0, 0, 0]
    names = ["0-15", "16-31", "32-49"]
    assert part_names(50) == names
    first = {name: log(tmp_path / name, "valid")[0] for name in ("one", "whole rows", "data", "tensor", "pipeline")}
    for name in ("data", "tensor", "pipeline"):
        assert first[name]["positions"] == pytest.approx(first["one"]["positions"], rel=1e-6)
        for ours, truth in zip(first[name]["sets"].values(), first["one"]["sets"].values(), strict=True):
            assert ours["positions"] == pytest.approx(truth["positions"], rel=1e-6)
    for run, masked in (("one", True), ("whole rows", False)):
        model, _, _ = load_model(tmp_path / run)
        last, prefixes = log(tmp_path / run, "valid")[-1], {"wiki": wiki, "code": code}
        for of_set, prefix in prefixes.items():
            data = DataConfig(train=wiki, valid=[DataSource(prefix=prefix)], seq_len=50, mask_documents=masked)
            truth = losses_by_position(model.eval(), build_dataset(data, "valid", VOCAB), 5, names)
            assert len(truth) == 3
            assert last["sets"][of_set]["positions"] == pytest.approx(truth, rel=1e-5)


def test_positions_of_documents_and_parts_of_rows():
    assert positions(torch.tensor([[0, 0, 1, 1, 1, 2], [4, 4, 4, 4, 4, 4]])).tolist() == [
        [0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5],
    ]  # fmt: skip
    assert part_names(16) == [] and part_names(17) == ["0-15", "16-16"]
    assert part_names(4096) == [
        "0-31", "32-63", "64-127", "128-255", "256-511", "512-1023", "1024-2047", "2048-4095",
    ]  # fmt: skip
    assert part_names(32768)[0] == "0-255" and part_names(32768)[1:5] == part_names(4096)[4:]


def test_positions_of_several_sets_count_by_their_tokens():
    parts = [
        Evaluation(2.0, 0.0, 30, {}, {"0-15": (1.0, 10), "16-31": (4.0, 10)}),
        Evaluation(2.0, 0.0, 30, {}, {"0-15": (2.0, 30)}),
    ]
    assert mean_evaluation(parts).positions == {"0-15": (1.75, 40), "16-31": (4.0, 10)}


def data_of(tmp_path, **options):
    tree = toy_tree("train", tmp_path)
    tree["data"] |= options
    return make_config(tree)


def test_forms_of_named_sets(tmp_path):
    sources = {
        "wiki": "w",
        "code": ["p", {"prefix": "q", "weight": 3}],
        "law": {"prefix": ["r", "s"], "weight": "tokens"},
    }
    config = data_of(tmp_path, valid=sources)
    sets = config.data.valid_sets()
    assert {name: [s.prefix for s in data.valid] for name, data in sets.items()} == {
        "wiki": ["w"], "code": ["p", "q"], "law": ["r", "s"],
    }  # fmt: skip
    assert [source.weight for source in sets["code"].valid] == [1.0, 3.0]
    assert make_config(parse_yaml(dump_config(config))) == config  # what a checkpoint keeps
    assert list(data_of(tmp_path, valid=["a", "b"]).data.valid_sets()) == [None]
    assert list(data_of(tmp_path).data.valid_sets()) == [None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": {"a": "p"}}, "has no prefix"),
        ({"valid": ["a", {"prefix": "b", "set": "x"}]}, "a belongs to no set and others do"),
        ({"train": [{"prefix": "b", "set": "x"}]}, "which only sources of data.valid have"),
    ],
)
def test_mixed_forms_are_refused(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        data_of(tmp_path, **options)
