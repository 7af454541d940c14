"""The gate's noise: its generator against one in Python's integers, its distribution, and what it depends on."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_taipan.model.noise import gumbel_noise

WORD = (1 << 64) - 1


def splitmix64(x: int) -> int:
    z = (x + 0x9E3779B97F4A7C15) & WORD
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & WORD
    return z ^ (z >> 31)


@settings(max_examples=30)
@given(st.integers(0, 2**62), st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 2**20), st.integers(0, 500))
def test_equals_the_generator_in_pythons_integers(seed, step, sample, position, layer):
    key = splitmix64(splitmix64(splitmix64(splitmix64(seed) ^ step) ^ layer) ^ sample)
    for draw in range(2):
        bits = splitmix64(key ^ (2 * position + draw))
        expected = -math.log(-math.log(((bits >> 40) + 0.5) / 2**24))
        found = gumbel_noise(seed, step, torch.tensor([sample]), torch.tensor([position]), layer)[0, 0, draw].item()
        assert abs(found - expected) < 1e-5 * max(1, abs(expected))


def uniform(seed=1, step=2, samples=400, positions=250, layer=3, offset=0) -> torch.Tensor:
    """[samples, positions, 2] the uniform variables behind the noise."""
    g = gumbel_noise(seed, step, torch.arange(samples) + offset, torch.arange(positions), layer)
    return (-(-g.double()).exp()).exp()


def test_is_uniform():
    """Chi square over 100 bins of 200,000 draws, for each class: 99 +- 4 sqrt(2 * 99)."""
    for draw in uniform().unbind(-1):
        counts = torch.histc(draw, 100, 0, 1)
        expected = draw.numel() / 100
        assert abs(((counts - expected) ** 2 / expected).sum() - 99) < 4 * math.sqrt(2 * 99)


def test_does_not_correlate_over_any_counter():
    u = uniform()
    others = {
        "class": (u[..., 0], u[..., 1]),
        "position": (u[:, 1:, 0], u[:, :-1, 0]),
        "position and class": (u[:, 1:, 0], u[:, :-1, 1]),
        "two positions": (u[:, 2:], u[:, :-2]),
        "sample": (u[1:], u[:-1]),
        "step": (u, uniform(step=3)),
        "layer": (u, uniform(layer=4)),
        "next layer": (u, uniform(layer=10)),
        "seed": (u, uniform(seed=2)),
        "step and seed swapped": (u, uniform(seed=2, step=1)),
        "sample and step swapped": (u[5], uniform(step=5, samples=3)[2]),
    }
    for name, (a, b) in others.items():
        assert not torch.equal(a, b), name
        correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert correlation.abs() < 4.5 / math.sqrt(a.numel()), name


@settings(max_examples=20)
@given(st.permutations(range(6)), st.integers(1, 5), st.integers(0, 9))
def test_any_split_of_batch_and_sequence_gives_the_same_bits(order, cut, start):
    whole = gumbel_noise(5, 7, torch.arange(6), torch.arange(20), 2)
    rows = torch.tensor(order)
    parts = [gumbel_noise(5, torch.tensor(7), rows[s], torch.arange(20), 2) for s in (slice(cut), slice(cut, None))]
    assert torch.equal(torch.cat(parts), whole[rows])
    shard = gumbel_noise(5, 7, torch.arange(6), torch.arange(start, 20), 2)
    assert torch.equal(shard, whole[:, start:])


def test_is_finite_at_the_ends_of_its_range():
    g = uniform(samples=2000)
    assert g.min() > 0 and g.max() < 1
    assert gumbel_noise(1, 2, torch.arange(4000), torch.arange(500), 0).isfinite().all()
