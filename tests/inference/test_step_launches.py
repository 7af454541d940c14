"""A step of one token through the kernels: few launches, and the numbers of the references in float64.

TRITON_INTERPRET=1 pytest tests/inference/test_step_launches.py; elsewhere skipped.
"""

import pytest
import torch

from megatron_taipan.inference.adjacent import make_adjacent
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.ops.operations import reference_ops
from tests.inference.networks import VOCABULARY, small_config
from tests.inference.test_decoding_gpu import SIZES
from tests.ops.devices import interpreted_only

pytestmark = [
    pytest.mark.slow,
    interpreted_only,
]
pytest.importorskip("triton")
PRESET = {
    "gate": {"gradient": "all", "refinement": "add", "weight": "one"}
}  # as launch/configs/taipan_1.3b.yaml has it


def network(pattern: str, **changes) -> Taipan:
    from tests.ops.interpreted import interpreted_ops

    config = small_config(pattern, **SIZES, **changes)
    model = Taipan(config, seed=1, ops=interpreted_ops()).eval().requires_grad_(False)
    make_adjacent(model)
    return model


def step_launches(pattern: str, rows: int) -> int:
    from tests.inference.launches import launches

    model = network(pattern, **PRESET).bfloat16()
    make_adjacent(model)  # the cast gave each weight its own memory
    tokens, cache = torch.zeros(rows, 1, dtype=torch.int64), model.new_cache(rows)
    with torch.no_grad():
        model(tokens.expand(rows, 5), cache=cache)
        model.step(tokens, cache)
    cache.advance()
    return sum(launches(lambda: model.step_on_device(tokens, cache)).values())


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("letter", "wanted"),
    [
        ("M", 6),  # norm, product, convolution, state, gated norm, product
        ("S", 16),  # norm; logits and four of the gate; product, attention in two, product; refinement; 5 of SwiGLU
        ("W", 10),
        ("A", 20),  # ten of the rotary embedding
        ("A A", 31),  # whose table all layers share
    ],
)
def test_launches_of_a_layer(letter, wanted, rows):
    assert step_launches(f"M {letter}", rows) - step_launches("M", rows) == wanted


def test_launches_around_the_layers():
    """Embedding, its cast, rows' numbers; sum, norm, head and its cast."""
    assert step_launches("M", 1) - (step_launches("M M", 1) - step_launches("M", 1)) == 7


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("conv", [{"conv_bias": True}, {"conv_bias": False, "d_conv": 2}, {"d_conv": 5}], ids=str)
def test_steps_equal_the_forward_pass_in_float64(groups, conv):
    """Beyond twice the window, whose buffer is moved; d_conv=5 leaves the convolution to the reference."""
    changes = {"mamba": SIZES["mamba"] | {"n_groups": groups} | conv}
    sizes = {name: value for name, value in SIZES.items() if name != "mamba"} | changes
    config = small_config("M S W A M", **sizes | {"attention": SIZES["attention"] | {"window": 8}})
    from tests.ops.interpreted import interpreted_ops

    model = Taipan(config, seed=1, ops=interpreted_ops()).eval().requires_grad_(False)
    exact = Taipan(config, seed=1, ops=reference_ops()).double().eval()
    make_adjacent(model)
    tokens = torch.randint(0, VOCABULARY, (3, 30), generator=torch.Generator().manual_seed(0))
    seq_idx = (torch.arange(30).expand(3, -1) >= torch.tensor([[0], [4], [7]])).int()  # left padding
    cache = model.new_cache(3)
    with torch.no_grad():
        model(tokens[:, :10], seq_idx=seq_idx[:, :10], cache=cache)
        got = torch.stack([model.step(tokens[:, at : at + 1], cache) for at in range(10, 30)], 1)
        wanted = exact(tokens, seq_idx=seq_idx).logits[:, 10:]
    assert (got - wanted).norm() / wanted.norm() < 1e-4
