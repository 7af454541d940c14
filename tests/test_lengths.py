"""Lengths in tokens become steps of the configured batch."""

import pytest

from megatron_taipan.config_errors import ConfigError
from megatron_taipan.config_loading import make_config
from megatron_taipan.config_text import dump_config
from megatron_taipan.plain_yaml import parse_yaml
from tests.train.toy import toy_tree


def tree_with(tmp_path, **sections) -> dict:
    return toy_tree("no/such/data", tmp_path / "run", **sections)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("4096 tokens", 4096), ("1.5K tokens", 1500), ("2_000 Tokens", 2000), ("1 token", 1), ("3,000 tokens", 3000)],
)
def test_tokens_are_rounded_up_to_steps_of_the_batch(tmp_path, text, tokens):
    tree = tree_with(tmp_path, train={"steps": "1M tokens", "stop_at": text, "global_batch": 4}, data={"seq_len": 32})
    config = make_config(tree)
    assert config.train.stop_at == -(-tokens // 128)
    assert config.train.steps == 7813  # 1,000,000 / 128 = 7812.5
    assert make_config(parse_yaml(dump_config(config))) == config  # what a checkpoint keeps is steps


def test_every_length_of_the_schedule_takes_tokens(tmp_path):
    optim = {"schedule": "wsd", "warmup_steps": "1K tokens", "decay_steps": "4K tokens", "wsd_decay_steps": "2K tokens"}
    tree = tree_with(tmp_path, train={"steps": 99, "global_batch": 4}, data={"seq_len": 25}, optim=optim)
    found = make_config(tree).optim
    assert (found.warmup_steps, found.decay_steps, found.wsd_decay_steps) == (10, 40, 20)


def test_tokens_without_a_batch_are_refused_with_what_is_missing(tmp_path):
    tree = tree_with(tmp_path, train={"steps": "1M tokens"})
    del tree["train"]["global_batch"]
    with pytest.raises(ConfigError, match="train.steps='1M tokens' is in tokens, which takes train.global_batch"):
        make_config(tree)


@pytest.mark.parametrize("text", ["many tokens", "1X tokens", "10B", "-5 tokens"])
def test_other_texts_are_no_lengths(tmp_path, text):
    with pytest.raises(ConfigError, match="train.steps="):
        make_config(tree_with(tmp_path, train={"steps": text}))


@pytest.mark.parametrize("text", ["8.3M tokens", "16.1M tokens", "1" + "0" * 400 + " tokens"])
def test_tokens_are_counted_exactly(tmp_path, text):
    tree = tree_with(tmp_path, train={"steps": text, "global_batch": 1, "micro_batch": 1}, data={"seq_len": 1000})
    number = text.split()[0]
    tokens = int(number[:-1].replace(".", "")) * 10**5 if number.endswith("M") else int(number)
    assert make_config(tree).train.steps == tokens // 1000


def test_tokens_of_a_run_in_stages_are_those_of_the_stages_they_cross(tmp_path):
    train = {"global_batch": 4, "stop_at": "900 tokens"}  # 100 a step: 5 steps, 200 a step: 2, 100 a step
    tree = tree_with(tmp_path, train=train, data={"seq_len": 25}, optim={"warmup_steps": "501 tokens"})
    tree["train"].pop("steps")
    null = {"data": {"seq_len": None}, "train": {"global_batch": None, "micro_batch": None}}
    tree["stages"] = [{"steps": "500 tokens", **null}, {"steps": 2, "data": {"seq_len": 50}}, {"steps": 9}]
    config = make_config(tree)
    assert [stage.steps for stage in config.stages] == [5, 2, 9]
    assert (config.train.stop_at, config.optim.warmup_steps) == (7, 6)
    for tokens, steps in (("500 tokens", 5), ("901 tokens", 8), ("9K tokens", 5 + 2 + 81)):
        assert make_config(tree | {"train": train | {"stop_at": tokens, "micro_batch": 2}}).train.stop_at == steps
    tree["optim"] |= {"schedule": "wsd", "wsd_decay_steps": "300 tokens"}
    with pytest.raises(ConfigError, match="optim.wsd_decay_steps='300 tokens' is in tokens, counted back"):
        make_config(tree)


@pytest.mark.parametrize(("section", "value"), [("train", 5), ("data", "web"), ("train", [1])])
def test_a_section_that_is_something_else_is_refused_as_such(tmp_path, section, value):
    tree = tree_with(tmp_path, optim={"warmup_steps": "1K tokens"})
    with pytest.raises(ConfigError, match=section):
        make_config(tree | {section: value})
    with pytest.raises(ConfigError, match=section):
        make_config(tree | {section: value, "stages": [{"steps": 3}]})
