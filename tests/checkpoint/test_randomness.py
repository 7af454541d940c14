"""The generators of random numbers that a user's code may draw from: started from the seed, kept and restored."""

import random

import numpy as np
import pytest
import torch

from megatron_taipan.checkpoint.randomness import random_states, seed_all, set_random_states


@pytest.fixture(autouse=True)
def as_before():
    """Later tests draw what they would have drawn."""
    states = random_states()
    yield
    set_random_states(states)


def drawn() -> list[float]:
    """Of each generator; normal ones too, of which two are made at a time and one is kept in the state."""
    return [
        random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(()).item(),
        torch.randn(()).item(),
    ]  # fmt: skip


@pytest.mark.parametrize("seed", [0, 7, 2**32 + 7, 2**63 - 1])
def test_the_seed_starts_every_generator(seed):
    seed_all(seed)
    first = drawn()
    drawn()
    seed_all(seed)
    assert drawn() == first
    seed_all(seed - 1 if seed else 1)
    assert not set(first) & set(drawn())


def test_states_are_those_of_all_generators():
    drawn()
    states = random_states()
    first = drawn() + drawn()
    set_random_states(states)
    assert drawn() + drawn() == first
    for name in states:  # those that are not named go on
        if name != "cuda":
            set_random_states(states)
            set_random_states({name: random_states()[name]})
            assert drawn() + drawn() == first
