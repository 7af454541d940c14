"""Each way of narrowing the choice, against its definition written out in plain Python."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_taipan.errors import UserError
from megatron_taipan.inference.sampling import Sampling, choose, keep_top_k, keep_top_p, penalize

logits_rows = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12, unique=True)


def kept(logits: torch.Tensor) -> set[int]:
    return {i for i, value in enumerate(logits[0].tolist()) if value != -math.inf}


@given(logits_rows, st.integers(1, 12))
def test_top_k_keeps_the_k_largest(row, k):
    largest = sorted(range(len(row)), key=lambda i: -row[i])[:k]
    assert kept(keep_top_k(torch.tensor([row]), k)) == set(largest)


@settings(max_examples=200)
@given(logits_rows, st.floats(0.01, 0.999))
def test_top_p_keeps_the_shortest_run_that_reaches_p(row, p):
    weights = [math.exp(value) for value in row]
    order = sorted(range(len(row)), key=lambda i: -row[i])
    held, wanted = 0.0, []
    for i in order:
        if held / sum(weights) >= p + 1e-6:
            break
        if wanted and abs(held / sum(weights) - p) <= 1e-6:
            return  # float32 cannot tell on which side of p this falls
        wanted.append(i)
        held += weights[i]
    assert kept(keep_top_p(torch.tensor([row]), p)) == set(wanted)


def test_penalty_lowers_seen_logits_of_either_sign():
    logits = torch.tensor([[2.0, -2.0, 3.0]])
    got = penalize(logits, torch.tensor([[True, True, False]]), 2.0)
    assert got.tolist() == [[1.0, -4.0, 3.0]]


def test_draws_follow_the_distribution():
    probability = torch.tensor([0.5, 0.3, 0.15, 0.05])
    generator = torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=1.0)
    seen = torch.zeros(1, 4, dtype=torch.bool)
    draws = Counter(int(choose(probability.log()[None], seen, sampling, [generator])) for _ in range(4000))
    for token, p in enumerate(probability.tolist()):
        assert draws[token] / 4000 == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 4000))


def test_temperature_sharpens():
    logits, seen = torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2, dtype=torch.bool)

    def share(temperature: float) -> float:
        generator = torch.Generator().manual_seed(0)
        picks = [int(choose(logits, seen, Sampling(temperature=temperature), [generator])) for _ in range(2000)]
        return sum(picks) / 2000

    for temperature in (0.5, 1.0, 2.0):
        assert share(temperature) == pytest.approx(1 / (1 + math.exp(-1 / temperature)), abs=0.045)


def test_a_token_cut_off_is_never_drawn():
    logits, seen = torch.tensor([[-30.0, 5.0, 5.1, -30.0]]), torch.zeros(1, 4, dtype=torch.bool)
    generator = torch.Generator().manual_seed(1)
    sampling = Sampling(temperature=5.0, top_k=2)
    assert {int(choose(logits, seen, sampling, [generator])) for _ in range(500)} == {1, 2}


@pytest.mark.parametrize(
    "least", [{"temperature": 1e-40}, {"temperature": 5e-324}, {"temperature": 2, "top_p": 1e-320}]
)
def test_the_least_values_choose_the_most_likely(least):
    logits, seen = torch.tensor([[-9.0, 5.0, 5.1, -30.0, 4.0]]), torch.zeros(1, 5, dtype=torch.bool)
    assert int(choose(logits, seen, Sampling(**least), [torch.Generator().manual_seed(1)])) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"repetition_penalty": 0},
        {"repetition_penalty": math.nan},
        {"repetition_penalty": math.inf},
    ],
)
def test_impossible_options_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Sampling(**options)
