"""The sample order is a bijection, looks random, and is the same point by point and in bulk."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_taipan.data.permutation import Permutation, derive_key


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_bijection_and_bulk(n, key):
    permutation = Permutation(n, key)
    points = [permutation(i) for i in range(n)]
    assert sorted(points) == list(range(n))
    assert permutation.many(np.arange(n)).tolist() == points


@given(n=st.integers(1, 2**50), key=st.integers(0, 2**64 - 1), data=st.data())
def test_large_domains_stay_in_range_and_agree(n, key, data):
    permutation = Permutation(n, key)
    some = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20))
    points = [permutation(i) for i in some]
    assert all(0 <= p < n for p in points)
    assert permutation.many(np.array(some)).tolist() == points


def test_it_shuffles():
    """Chi-squared of where the first entry lands, and no correlation between neighbours."""
    n, trials = 10, 5000
    counts = np.bincount([Permutation(n, derive_key("t", t))(0) for t in range(trials)], minlength=n)
    assert ((counts - trials / n) ** 2 / (trials / n)).sum() < 30  # 9 degrees of freedom: p < 0.001 above 27.9
    order = Permutation(100_000, 7).many(np.arange(100_000))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(100_000))[0, 1]) < 0.02


def test_keys_differ():
    assert derive_key("a", 1) != derive_key("a", 2) != derive_key("a1")
    assert derive_key("ab", "c") != derive_key("a", "bc")
