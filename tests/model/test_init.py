"""Initial values: a pure function of (seed, name), in the ranges of the sources."""

import math

import pytest
import torch
import torch.nn.functional as F

from megatron_taipan.model.init import initial_value
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.parallel.tensor import TensorParallel
from megatron_taipan.parameters import merge_shards, parameter_table
from tests.model.small import small_config


def parameters(pattern: str, seed: int = 1, **changes) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in Taipan(small_config(pattern, **changes), seed=seed).named_parameters()}


def wide(pattern: str = "M S A", **changes) -> dict[str, torch.Tensor]:
    """Large enough for statistics: thousands of heads and values."""
    mamba = {"headdim": 1, "n_groups": 1, "d_state": 16}
    return parameters(pattern, d_model=512, d_ff=600, init_std=0.05, mamba=mamba, **changes)


def test_values_depend_on_seed_and_name_alone():
    """Neither on global random state, nor on which other layers there are."""
    torch.manual_seed(1)
    first = parameters("M S A")
    torch.manual_seed(2)
    again = parameters("M S A")
    other = parameters("W S M")  # the same number of residual projections
    assert all(torch.equal(first[name], again[name]) for name in first)
    shared = [n for n in first if n.startswith(("layers.1.", "embedding", "final_norm"))]
    assert len(shared) > 8
    assert all(torch.equal(first[name], other[name]) for name in shared)


def test_other_seeds_and_other_names_give_other_values():
    first, second = parameters("M M S S"), parameters("M M S S", seed=2)
    drawn = [n for n, p in first.items() if p.unique().numel() > 1]
    assert {n.rpartition(".")[2] for n in drawn} >= {"in_proj_x", "A_log", "dt_bias", "conv_x_bias", "q_proj", "weight"}
    assert not any(torch.equal(first[n], second[n]) for n in drawn)
    assert not torch.equal(first["layers.0.mixer.in_proj_x"], first["layers.1.mixer.in_proj_x"])
    assert not torch.equal(first["layers.0.mixer.in_proj_x"], first["layers.0.mixer.in_proj_z"])


def test_the_default_device_changes_nothing():
    """`with torch.device("cuda")` around the class of transformers, which draws what no file held."""
    config = small_config("M S W A")
    for name, spec in parameter_table(config).items():
        with torch.device("meta"):
            value = initial_value(name, spec, config, seed=3)
        assert torch.equal(value, initial_value(name, spec, config, seed=3)), name


def test_drawing_leaves_torchs_random_state_alone():
    before = torch.random.get_rng_state()
    parameters("M S")
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("size", [2, 4])
def test_tensor_ranks_hold_slices_of_the_same_network(size):
    config = small_config("M S A", d_model=32, mamba={"n_groups": 2}, attention={"n_kv_heads": 2}, vocab_size=37)
    whole = dict(Taipan(config, seed=3).named_parameters())
    table = parameter_table(config, size)
    ranks = [
        dict(Taipan(config, seed=3, tensor_parallel=TensorParallel(size, r)).named_parameters()) for r in range(size)
    ]
    for name, spec in table.items():
        assert ranks[0][name].shape == spec.local_shape(size)
        assert torch.equal(merge_shards([rank[name].detach() for rank in ranks], spec), whole[name]), name


def uniform_within(values: torch.Tensor, low: float, high: float) -> None:
    assert values.min() >= low - 1e-6 * abs(low) and values.max() <= high * (1 + 1e-6)
    # Kolmogorov's distance to the uniform distribution, four standard deviations
    ranks = torch.arange(1, values.numel() + 1) / values.numel()
    distance = ((values.flatten().sort().values - low) / (high - low) - ranks).abs().max()
    assert distance < 2.2 / math.sqrt(values.numel())


def test_mamba2_parameters_are_drawn_as_in_the_source():
    p = {n.removeprefix("layers.0.mixer."): v for n, v in wide().items() if "layers.0" in n}
    uniform_within(p["A_log"].exp(), 1, 16)
    uniform_within(F.softplus(p["dt_bias"].double()).log().float() + 10, math.log(1e-3) + 10, math.log(0.1) + 10)
    assert (p["D"] == 1).all() and (p["norm_weight"] == 1).all()
    for name in ("in_proj_z", "in_proj_x", "in_proj_B", "in_proj_C", "in_proj_dt"):
        uniform_within(p[name], -1 / math.sqrt(512), 1 / math.sqrt(512))
    for name in ("conv_x_weight", "conv_x_bias", "conv_B_weight"):  # torch's Conv1d of 4 taps on one channel
        uniform_within(p[name], -0.5, 0.5)
    # M has one projection into the residual stream, S and A two each; 1024 = d_inner
    bound = 1 / math.sqrt(1024) / math.sqrt(5)
    uniform_within(p["out_proj"], -bound, bound)


def test_attention_embedding_and_gate_are_normal_with_scaled_residual_projections():
    p = wide()
    assert p["embedding.weight"].std().item() == pytest.approx(0.05, rel=0.03)
    for layer in (1, 2):
        for name, std in {
            "attention.q_proj": 0.05,
            "attention.k_proj": 0.05,
            "attention.v_proj": 0.05,
            "attention.out_proj": 0.05 / math.sqrt(5),
            "mlp.gate_proj": 0.05,
            "mlp.up_proj": 0.05,
            "mlp.down_proj": 0.05 / math.sqrt(5),
        }.items():
            values = p[f"layers.{layer}.{name}"]
            assert values.std().item() == pytest.approx(std, rel=0.03), name
            assert values.mean().abs() < 4 * std / math.sqrt(values.numel())
    assert (p["layers.1.gate.bias"] == 0).all()
    assert p["layers.1.gate.weight"].std().item() == pytest.approx(0.05, rel=0.15)


def test_the_floor_of_dt_holds():
    config = small_config("M", d_model=512, mamba={"headdim": 1, "dt_init": (1e-6, 1e-2), "dt_init_floor": 1e-4})
    spec = parameter_table(config)["layers.0.mixer.dt_bias"]
    dt = F.softplus(initial_value("layers.0.mixer.dt_bias", spec, config, 1).double())
    assert dt.min().item() == pytest.approx(1e-4, rel=1e-3)
    assert (dt < 1.01e-4).double().mean().item() == pytest.approx(0.5, abs=0.07)  # half of the range in logarithms


def test_all_parameters_start_in_float32():
    assert all(p.dtype == torch.float32 for p in parameters("M S W A").values())
