"""Lengths in tokens become steps of the configured batch."""

import pytest

from megatron_taipan.config import ConfigError, dump_config, make_config
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
