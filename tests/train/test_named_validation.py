"""Validation sets by name: each with a loss of its own, which another program finds as well."""

import math

import pytest

from megatron_taipan.config import ConfigError, DataConfig, DataSource, dump_config, make_config
from megatron_taipan.data.loader import build_dataset
from megatron_taipan.evaluation.perplexity import score
from megatron_taipan.inference.loading import load_model
from megatron_taipan.plain_yaml import parse_yaml
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
    found = {}
    for name, prefix in (("wiki", wiki), ("code", code)):
        data = DataConfig(train=train, valid=[DataSource(prefix=prefix)], seq_len=24)
        found[name] = score(model, build_dataset(data, "valid", VOCAB), samples=5)
        assert record["sets"][name]["ce"] == pytest.approx(found[name].ce, rel=1e-5)
        assert record["sets"][name]["tokens"] == found[name].tokens
    assert found["wiki"].ce != found["code"].ce
    tokens = sum(part.tokens for part in found.values())
    whole = sum(part.ce * part.tokens for part in found.values()) / tokens
    assert record["ce"] == pytest.approx(whole, rel=1e-5) and record["tokens"] == tokens
    assert record["perplexity"] == pytest.approx(math.exp(whole), rel=1e-5)
    assert 0 <= record["layers.1.selected"] <= 1


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
