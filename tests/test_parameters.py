"""The table of parameters: it is complete, and splitting is undone by merging."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_taipan.config import ModelConfig
from megatron_taipan.errors import UserError
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.parallel.tensor import TensorParallel
from megatron_taipan.param_spec import ParamSpec
from megatron_taipan.parameters import merge_shards, parameter_table, take_shard

PRESETS = {"taipan": "(M*2 S)*2", "mamba2": "M*2", "transformerpp": "A*2", "jamba": "M*2 A", "samba": "M*2 W"}
TENSOR_SIZES = (1, 2, 4, 8)


def config(pattern: str, **sizes) -> ModelConfig:
    """Of the presets' shape at a width of 32: 16 SSM heads, 8 query heads."""
    return ModelConfig.model_validate(
        {
            "pattern": pattern,
            "vocab_size": sizes.get("vocab_size", 97),
            "d_model": 32,
            "d_ff": 48,
            "tie_embeddings": sizes.get("tie_embeddings", True),
            "mamba": {
                "d_state": 3,
                "headdim": 4,
                "n_groups": sizes.get("n_groups", 1),
                "conv_bias": sizes.get("conv_bias", True),
            },
            "attention": {"n_heads": 8, "n_kv_heads": sizes.get("n_kv_heads", 8), "window": 8},
        }
    )


CONFIGS = st.builds(
    config,
    st.sampled_from(sorted(PRESETS.values())),
    vocab_size=st.integers(1, 130),
    n_groups=st.sampled_from([1, 2, 4, 8, 16]),
    n_kv_heads=st.sampled_from([1, 2, 4, 8]),
    tie_embeddings=st.booleans(),
    conv_bias=st.booleans(),
)


@settings(max_examples=40)
@given(CONFIGS, st.sampled_from(TENSOR_SIZES))
def test_split_then_merge_is_the_identity(model, size):
    """For every parameter; every number of it stands on some rank, on each rank in the promised shape."""
    whole = parameter_table(model)
    for name, spec in parameter_table(model, size).items():
        assert spec.shape == whole[name].shape
        full = torch.arange(1, math.prod(spec.shape) + 1).view(spec.shape)
        shards = [take_shard(full, spec, size, rank) for rank in range(size)]
        assert {tuple(s.shape) for s in shards} == {spec.local_shape(size)}
        assert torch.equal(merge_shards(shards, spec), full), name
        if spec.split is None:
            assert all(torch.equal(s, full) for s in shards)
        else:
            assert sum(int((s > 0).sum()) for s in shards) == full.numel()  # nothing twice; padding is zero
            exact = spec.shape[spec.split] % size == 0
            assert exact or spec.padded, f"{name}: only vocabularies may be padded"


@settings(max_examples=15)
@given(CONFIGS, st.sampled_from(TENSOR_SIZES))
def test_table_and_built_model_name_the_same_parameters(model, size):
    table = parameter_table(model, size)
    with torch.device("meta"):
        built = Taipan(model, tensor_parallel=TensorParallel(size, size - 1))
    named = dict(built.named_parameters())
    assert named.keys() == table.keys()
    for name, parameter in named.items():
        assert parameter.shape == table[name].local_shape(size), name
        assert parameter.full_name == name and parameter.spec == table[name]
        split = table[name].split is not None and size > 1
        assert getattr(parameter, "tensor_model_parallel", False) == split, name


@pytest.mark.parametrize("size", TENSOR_SIZES)
@pytest.mark.parametrize("n_groups", [1, 2, 4, 16])
def test_heads_and_their_groups_stay_together(size, n_groups):
    """B and C are split where each rank has whole groups, else every rank has all of them and adds its gradient."""
    table = parameter_table(config("M S", n_groups=n_groups, n_kv_heads=2), size)
    for name in ("in_proj_B", "in_proj_C", "conv_B_weight", "conv_C_bias"):
        spec = table[f"layers.0.mixer.{name}"]
        assert (spec.split, spec.summed) == ((0, False) if n_groups % size == 0 else (None, True)), name
    for name in ("k_proj", "v_proj"):
        spec = table[f"layers.1.attention.{name}"]
        assert (spec.split, spec.summed) == ((0, False) if size <= 2 else (None, True))
    rows = {
        "in_proj_z": 0,
        "in_proj_x": 0,
        "in_proj_dt": 0,
        "A_log": 0,
        "D": 0,
        "dt_bias": 0,
        "norm_weight": 0,
        "out_proj": 1,
    }
    for name, dim in rows.items():
        assert table[f"layers.0.mixer.{name}"].split == dim


def test_decay_and_float32_are_as_specified():
    """A_log, dt_bias, D, norms and biases take no decay; A_log, dt_bias, D and the gate stay float32."""
    table = parameter_table(config("M S A", tie_embeddings=False))
    without = {name for name, spec in table.items() if not spec.decay}
    assert without == {n for n in table if n.endswith(("A_log", "dt_bias", ".D", "bias")) or "norm" in n}
    fp32_params = {name for name, spec in table.items() if spec.float32}
    assert fp32_params == {n for n in table if n.endswith(("A_log", "dt_bias", ".D")) or ".gate." in n}
    assert all((len(spec.shape) == 2) == spec.decay for spec in table.values())


@pytest.mark.parametrize(
    ("pattern", "sizes", "tensor", "words"),
    [
        ("M", {}, 3, ["parallel.tensor=3", "SSM heads=16", "16 % 3 = 1", "1, 2, 4, 8, 16"]),
        ("S", {}, 16, ["parallel.tensor=16", "n_heads=8", "8 % 16 = 8"]),
        ("A", {}, 3, ["parallel.tensor=3", "n_heads=8", "8 % 3 = 2"]),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_numbers(pattern, sizes, tensor, words):
    with pytest.raises(UserError) as raised:
        parameter_table(config(pattern, **sizes), tensor)
    assert all(word in str(raised.value) for word in words), str(raised.value)


@pytest.mark.parametrize("section", ["n_groups", "n_kv_heads"])
def test_ranks_and_shared_groups_must_divide_one_another(section):
    """12 heads in 4 groups over 6 ranks: a rank's two heads would lie in two groups."""
    tree = {"pattern": "M W", "vocab_size": 9, "d_model": 24, "d_ff": 48, "mamba": {"headdim": 4, "n_groups": 1}}
    tree["attention"] = {"n_heads": 12, "n_kv_heads": 12}
    tree["mamba" if section == "n_groups" else "attention"][section] = 4
    with pytest.raises(UserError, match=rf"parallel\.tensor=6.*{section}=4.*1, 2, 4 or a multiple of 4"):
        parameter_table(ModelConfig.model_validate(tree), 6)


def test_a_feed_forward_width_that_does_not_fit_is_refused():
    tree = config("W").model_dump() | {"d_ff": 50}
    with pytest.raises(UserError, match=r"d_ff=50 \(50 % 4 = 2\)"):
        parameter_table(ModelConfig.model_validate(tree), 4)


def test_shards_are_copies():
    spec, full = ParamSpec((4, 2), "ones", split=0), torch.zeros(4, 2)
    take_shard(full, spec, 2, 0).fill_(1)
    take_shard(full, spec, 1, 0).fill_(1)
    assert (full == 0).all()
