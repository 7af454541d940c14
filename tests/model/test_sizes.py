"""Parameter counts of the paper's sizes, and operations per token."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_taipan.config_loading import load_config
from megatron_taipan.model.flops import layer_flops, layer_params
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.model_config import ModelConfig
from tests.model.small import small_config, small_model, tokens

LLAMA3 = 128_256
SIZES = {"190m": (768, 12, 2048, 188e6), "450m": (1024, 16, 2816, 446e6), "1.3b": (2048, 16, 5632, 1295e6)}
PATTERNS = {"190m": "(M*6 S)*3", "450m": "(M*6 S)*6", "1.3b": "(M*6 S)*5"}
MAMBA = {"190m": "M*24", "450m": "M*48", "1.3b": "M*40"}


def config(size: str, pattern: str) -> ModelConfig:
    d_model, heads, d_ff, _ = SIZES[size]
    tree = {"pattern": pattern, "vocab_size": LLAMA3, "d_model": d_model, "d_ff": d_ff, "attention": {"n_heads": heads}}
    return ModelConfig.model_validate(tree)


def by_hand(c: ModelConfig) -> int:
    """Counted from the published layers: mamba_ssm's Mamba2, and Llama's attention layer with MHA (plus S's gate)."""
    d, inner, n, f = c.d_model, 2 * c.d_model, 128, c.d_ff
    heads = inner // 64
    mamba = d + d * (2 * inner + 2 * n + heads) + (4 + 1) * (inner + 2 * n) + 3 * heads + inner + inner * d
    attention = d + 4 * d * d + d + 3 * d * f
    per_letter = {"M": mamba, "A": attention, "W": attention, "S": attention + 2 * d + 2}
    return c.vocab_size * d + sum(per_letter[letter] for letter in c.letters) + d


@pytest.mark.parametrize("size", SIZES)
def test_taipan_has_the_specified_number_of_parameters(size):
    with torch.device("meta"):
        model = Taipan(config(size, PATTERNS[size]))
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(SIZES[size][3], rel=0.01)
    assert count == model.num_params() == by_hand(model.config)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("letter", "MAWS")
def test_baselines_count_as_their_published_layers_do(size, letter):
    pattern = MAMBA[size] if letter == "M" else PATTERNS[size].replace("S", letter)
    with torch.device("meta"):
        model = Taipan(config(size, pattern))
    assert model.num_params() == by_hand(model.config) == sum(p.numel() for p in model.parameters())
    for index, layer in enumerate(model.layers):
        assert layer_params(model.config, index) == sum(p.numel() for p in layer.parameters())


def test_presets_have_the_tables_sizes():
    """The files under launch/configs, where they are part of the checkout."""
    folder = Path(__file__).resolve().parents[2] / "launch" / "configs"
    for size, (d_model, heads, d_ff, count) in SIZES.items():
        preset = load_config(folder / f"taipan_{size}.yaml").model
        assert (preset.d_model, preset.attention.n_heads, preset.d_ff) == (d_model, heads, d_ff)
        assert preset.letters == config(size, PATTERNS[size]).letters
        assert preset.vocab_size == LLAMA3 and preset.tie_embeddings and preset.n_kv_heads == heads
        assert by_hand(preset) == pytest.approx(count, rel=0.01)


def test_untied_heads_and_odd_options_are_counted():
    for changes in ({"tie_embeddings": False}, {"mamba": {"conv_bias": False}}, {"attention": {"n_kv_heads": 1}}):
        model = small_model("M S W A", **changes)
        assert model.num_params() == sum(p.numel() for p in model.parameters())


def counted(model: Taipan, length: int) -> float:
    """What torch counts of matrix products in one forward pass, per token."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens(1, length))
    return counter.get_total_flops() / length


@pytest.mark.parametrize("letter", "WA")
def test_operations_of_attention_layers_equal_what_torch_counts(letter):
    """A window that hides nothing, so that the dense products that torch counts differ by the causal half only."""
    length = 64
    model = small_model(letter, torch.float32, attention={"window": length}).eval()
    dense_minus_causal = 4 * 24 * (length - (length + 1) / 2)
    assert counted(model, length) - dense_minus_causal == pytest.approx(model.num_flops_per_token(length), rel=1e-6)


def test_operations_of_the_projections_of_mamba2_equal_what_torch_counts():
    model = small_model("M", torch.float32).eval()
    projections = [s.numel() for n, s in model.named_parameters() if "proj" in n or n == "embedding.weight"]
    scan_and_convolution = model.num_flops_per_token(10) - 2 * sum(projections)
    inner, states, state = 48, 2 * 8, 8
    assert scan_and_convolution == 2 * 4 * (inner + 2 * states) + inner * (5 * state + 2)


def test_selective_attention_counts_queries_at_the_capacity():
    none, some, every = (layer_flops(small_config("S", gate={"capacity": c}), "S", 50) for c in (0, 0.25, 1))
    window = layer_flops(small_config("W"), "W", 50)
    assert every == window + 4 * 24  # the gate
    assert some - none == pytest.approx((every - none) / 4)
    visible = sum(min(i + 1, 6) for i in range(50)) / 50
    assert every - none == pytest.approx(4 * 24 * 24 + 4 * 24 * visible)


def test_longer_documents_cost_more_in_full_attention_only():
    for letter, grows in {"M": False, "W": False, "A": True}.items():
        near, far = (layer_flops(small_config(letter), letter, length) for length in (10_000, 20_000))
        assert (far > 1.5 * near) == grows and far >= near
