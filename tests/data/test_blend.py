"""Blends keep every source within one sample of its share, at every point."""

from fractions import Fraction

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_taipan.data.blend import MAX_PERIOD, Blend, whole_weights


@settings(max_examples=80, deadline=None)
@given(weights=st.lists(st.integers(1, 150), min_size=1, max_size=10))
def test_within_one_sample_everywhere_and_each_sample_once(weights):
    blend = Blend([float(w) for w in weights])
    total, drawn = sum(weights), [0] * len(weights)
    far = np.array([10**15 + 7, *range(2 * blend.period + 3)])
    assert [*map(tuple, np.stack(blend.many(far), 1).tolist())] == [blend(i) for i in far.tolist()]
    for i in range(2 * blend.period + 3):
        assert blend.drawn(i) == drawn
        source, index = blend(i)
        assert index == drawn[source]  # nothing repeated, nothing skipped
        drawn[source] += 1
        assert all(abs(d - Fraction(w * (i + 1), total)) < 1 for d, w in zip(drawn, weights, strict=True))


def test_decimal_weights_are_taken_exactly():
    assert whole_weights([0.7, 0.3]) == [7, 3]
    assert whole_weights([0.1, 0.2, 0.25]) == [2, 4, 5]
    assert whole_weights([1.0, 1.0]) == [1, 1]
    assert whole_weights([1e-3, 1.0]) == [1, 1000]


def test_extreme_weights():
    weights = [1.0, 1e-12, 0.333333333333]
    whole = whole_weights(weights)
    assert sum(whole) == MAX_PERIOD and min(whole) == 1
    blend = Blend(weights)
    assert np.bincount([blend(i)[0] for i in range(blend.period)]).tolist() == whole
