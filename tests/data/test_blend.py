"""Blends keep every source within one sample of its share, at every point."""

import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_taipan.data.blend import MAX_PERIOD, Blend, chairman_assignment, whole_weights


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


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(st.floats(0.05, 1), min_size=2, max_size=200))
def test_rounding_moves_no_share_by_a_step(weights):
    whole = whole_weights(weights)
    total, period = sum(Fraction(str(w)) for w in weights), sum(whole)
    assert period <= MAX_PERIOD
    steps = [Fraction(str(w)) * period / total for w in weights]
    assert all(abs(w - step) < 1 for w, step in zip(whole, steps, strict=True))


def test_sources_below_a_step_are_paid_by_all_others_in_proportion():
    whole = whole_weights([1e-9] * 40_000 + [0.333333333, 0.666666667])
    assert whole[:-2] == [1] * 40_000 and sum(whole) == MAX_PERIOD
    assert abs(whole[-1] - 2 * whole[-2]) <= 2


def test_a_blend_that_is_rounded_says_so_in_its_fingerprint(tmp_path):
    """So that a run whose weights were rounded in another way is not resumed in another order."""
    from megatron_taipan.data import loader
    from megatron_taipan.data.indexed import IndexedWriter
    from megatron_taipan.data_config import DataConfig, DataSource

    for name in "ab":
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            writer.add_document(list(range(50)))

    def fingerprint(*weights):
        train = [DataSource(prefix=str(tmp_path / name), weight=w) for name, w in zip("ab", weights, strict=True)]
        return loader.build_dataset(DataConfig(train=train, seq_len=8, valid_fraction=0), "train", 64).fingerprint

    exact, rounded = fingerprint(0.7, 0.3), fingerprint(0.7, 0.3333333)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "whole_weights", lambda weights: [1] * len(weights))
        assert fingerprint(0.7, 0.3) == exact and fingerprint(0.7, 0.3333333) != rounded


def test_a_share_that_is_rounded_by_a_tenth_or_more_is_told_with_numbers(tmp_path):
    from megatron_taipan.data.indexed import IndexedWriter
    from megatron_taipan.data.loader import build_dataset
    from megatron_taipan.data_config import DataConfig, DataSource

    for name in "abc":
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            writer.add_document(list(range(50)))

    def told(*weights):
        train = [DataSource(prefix=str(tmp_path / k), weight=w) for k, w in zip("abc", weights, strict=False)]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            build_dataset(DataConfig(train=train, seq_len=8, valid_fraction=0), "train", 64)
        return [str(warning.message) for warning in caught]

    [said] = told(1, 1e-9)
    assert f"{tmp_path}/b with weight 1e-09 is 1e-09 of the blend, and its share becomes 7.63e-06" in said
    assert "steps of 1/131072: it is drawn 7629 times as often" in said  # 1e9 / 131072 = 7629.4
    assert told(0.7, 0.3) == told(1.0, 1e-3) == told(1, 12.1 / 131072) == told(1, 10.4 / 131072) == []
    [said] = told(1, 1.4 / 131072)  # one step, not 1.4
    assert "it is drawn 0.7143 times" in said
    assert len(told(1, 1e-9, 1e-7)) == 2


def test_an_infinite_weight_is_one_line():
    from megatron_taipan.config_loading import make_config
    from megatron_taipan.errors import UserError

    data = {"train": [{"prefix": "a", "weight": float("inf")}, "b"]}
    with pytest.raises(UserError, match="weight.*finite"):
        make_config({"model": {"pattern": "M"}, "data": data, "train": {"steps": 1}, "checkpoint": {"dir": "x"}})


@settings(max_examples=40, deadline=None)
@given(weights=st.lists(st.integers(1, 40), min_size=2, max_size=8))
def test_the_order_is_the_papers_rule(weights):
    """Tijdeman's rule in fractions, every source looked at in every turn."""
    n, total = len(weights), sum(weights)
    slack, drawn, order = Fraction(1, 2 * n - 2), [0] * n, []
    for i in range(total):
        shares = [Fraction(w * (i + 1), total) for w in weights]
        eligible = [k for k in range(n) if shares[k] - drawn[k] >= slack]
        best = min(eligible, key=lambda k: (1 - slack - shares[k] + drawn[k]) / weights[k])  # of equal ones the first
        order.append(best)
        drawn[best] += 1
    assert chairman_assignment(weights).tolist() == order


def test_by_tokens_every_source_is_read_once_in_an_epoch_of_all(tmp_path):
    """By samples, to be exact: of 15 tokens one sample of 8 is left, of 33 four."""
    from megatron_taipan.data.indexed import IndexedWriter
    from megatron_taipan.data.loader import build_dataset
    from megatron_taipan.data_config import DataConfig

    train = []
    for name, tokens in (("a", 15), ("b", 33), ("c", 24)):
        with IndexedWriter(tmp_path / name, np.uint16) as writer:
            writer.add_document(list(range(tokens)))
        train.append({"prefix": str(tmp_path / name), "weight": "tokens"})
    data = build_dataset(DataConfig(train=train, seq_len=8, valid_fraction=0), "train", 64)
    assert data.blend.weights == [1, 4, 3] and len(data) == 8
    assert set(data.epochs(8).values()) == {1.0}
