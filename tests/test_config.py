"""The tree of options: sizes and options that do not go together are refused with the numbers."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_taipan.config_errors import ConfigError
from megatron_taipan.config_loading import make_config
from megatron_taipan.config_text import dump_config
from megatron_taipan.errors import divisors
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.parallel_config import ParallelConfig
from tests.config_tree import tree


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__mamba": {"headdim": 36}}, ["headdim=36", "2 * 48 = 96", "remainder 24"]),
        ({"model__mamba": {"headdim": 16, "n_groups": 4}}, ["n_groups=4", "6 SSM heads", "1, 2, 3, 6"]),
        ({"model__attention": {"n_heads": 5}}, ["n_heads=5", "d_model=48", "48 % 5 = 3"]),
        ({"model__attention": {"n_kv_heads": 5}}, ["n_kv_heads=5", "12 % 5 = 2", "1, 2, 3, 4, 6, 12"]),
        ({"model__pattern": "A", "model__attention": {"n_heads": 16}}, ["even head size", "3"]),
        ({"train__micro_batch": 3}, ["micro_batch=3", "global_batch=8", "remainder 2"]),
        ({"parallel__zero_stage": 0}, ["precision=bf16", "zero_stage=0"]),
        ({"parallel": {"pipeline": 2, "zero_stage": 2}}, ["pipeline=2", "zero_stage=2"]),
    ],
)
def test_sizes_that_do_not_fit_show_the_arithmetic(changes, words):
    changes = {"model__mamba": {"headdim": 16}} | changes
    with pytest.raises(ConfigError) as raised:
        make_config(tree(**changes))
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_sizes_of_layers_that_the_pattern_lacks_are_not_checked():
    make_config(tree(model__pattern="W", model__mamba={"headdim": 36}))
    make_config(tree(model__pattern="M", model__mamba={"headdim": 16}, model__attention={"n_heads": 5}))


def test_values_are_checked_on_assignment_too():
    config = make_config(tree(model__mamba={"headdim": 16}))
    with pytest.raises(ValueError):
        config.train.steps = -1
    with pytest.raises(ValueError):
        config.train.stepz = 1


@given(st.integers(1, 500))
def test_divisors(n):
    assert divisors(n) == ", ".join(str(d) for d in range(1, 65) if d <= n and n % d == 0)


def test_derived_sizes():
    config = ModelConfig.model_validate(tree(model__pattern="M | S", model__mamba={"headdim": 16})["model"])
    assert (config.letters, config.cuts, config.n_layers) == ("MS", (1,), 2)
    assert (config.d_inner, config.mamba_heads, config.n_kv_heads, config.head_dim) == (96, 6, 12, 4)


@pytest.mark.parametrize(
    ("tensor", "sequence", "seq_len", "sharded"),
    [(2, None, 64, True), (2, None, 63, False), (1, None, 64, False), (1, True, 64, False), (2, False, 64, False),
     (2, True, 63, True)],
)  # fmt: skip
def test_tokens_are_sharded_where_that_can_be_or_is_asked_for(tensor, sequence, seq_len, sharded):
    assert ParallelConfig(tensor=tensor, sequence=sequence).shards_tokens(seq_len) == sharded


def test_a_saved_configuration_shards_tokens_in_its_next_layout_too():
    saved = yaml.safe_load(dump_config(make_config(tree(model__d_model=96))))
    saved["parallel"]["tensor"] = 2
    config = make_config(saved)
    assert config.parallel.shards_tokens(config.data.seq_len)
