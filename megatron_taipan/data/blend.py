"""The order in which a blend visits its sources.

Which source sample i comes from must be computable from i alone (state is one number), and at every point the samples
drawn from a source must be within one of its exact share. The schedule that keeps both is Tijdeman's chairperson
assignment ("The chairman assignment problem", Discrete Mathematics 32, 1980): among the sources that may be served
without running ahead, serve the one whose deadline comes first. It keeps |drawn - share * i| < 1 for every source and
every i. With whole-number weights of sum P it repeats after P samples, so one table of P entries answers any i.
"""

import heapq
from fractions import Fraction
from math import gcd, lcm

import numpy as np

from megatron_taipan.errors import UserError

MAX_PERIOD = 1 << 17


def whole_weights(weights: list[float]) -> list[int]:
    """Whole numbers in the proportion of `weights`, as their decimal notation gives it.

    0.7 and 0.3 give 7 and 3. Where the exact numbers would have a sum above MAX_PERIOD they are rounded to that sum:
    shares in steps of 1/131072, each within one step of the exact one. A share below one step gets one step, which
    the others give up in proportion.
    """
    whole = exact_weights(weights)
    if sum(whole) <= MAX_PERIOD:
        return whole
    if len(whole) > MAX_PERIOD // 2:
        raise UserError(f"a blend of {len(whole)} sources has too many; the limit is {MAX_PERIOD // 2}")
    rounded = [1] * len(whole)
    large = list(range(len(whole)))
    while True:
        room, total = MAX_PERIOD - (len(whole) - len(large)), sum(whole[k] for k in large)
        left = [k for k in large if whole[k] * room >= total]
        if len(left) == len(large):
            break
        large = left
    for k in large:
        rounded[k] = whole[k] * room // total
    # the largest remainders are rounded up; of equal ones the larger source's, relative to which a step is less
    by_remainder = sorted(large, key=lambda k: (whole[k] * room % total, whole[k]), reverse=True)
    for k in by_remainder[: MAX_PERIOD - sum(rounded)]:
        rounded[k] += 1
    return rounded


def exact_weights(weights: list[float]) -> list[int]:
    """The smallest whole numbers in exactly the proportion of `weights`."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(fraction.denominator for fraction in exact))
    whole = [int(fraction * scale) for fraction in exact]
    common = gcd(*whole)
    return [number // common for number in whole]


def misweighted(weights: list[float]) -> list[tuple[int, Fraction, Fraction]]:
    """Sources whose share `whole_weights` changes by a tenth of itself or more: the number of each, the share that its
    weight asks for and the share that it gets. Only shares below ten steps can be among them."""
    whole, exact = whole_weights(weights), exact_weights(weights)
    period, total = sum(whole), sum(exact)
    return [
        (k, Fraction(exact[k], total), Fraction(whole[k], period))
        for k in range(len(whole))
        if 10 * abs(whole[k] * total - exact[k] * period) >= exact[k] * period
    ]


def chairman_assignment(weights: list[int]) -> np.ndarray:
    """One period of the schedule: int32 [sum(weights)], the source of each sample.

    With n sources, share_k(i) = w_k * i / P and slack = 1 / (2n - 2): when sample i (from 0) is given out, source k is
    eligible if share_k(i + 1) - drawn_k >= slack; of the eligible ones the least (1 - slack - share_k(i + 1) + drawn_k)
    / w_k, the time until k would lag too far, is served, of equal ones the first. Both are turns that are known as soon
    as drawn_k is, so that a turn costs a heap's few comparisons and not a look at every source.
    """
    n, period = len(weights), sum(weights)
    if n == 1:
        return np.zeros(1, np.int32)
    unit = 2 * n - 2  # 1 / slack
    out = np.empty(period, np.int32)
    coming: list[list[int]] = [[] for _ in range(period + 1)]  # sources by the turn from which they are eligible
    drawn = [0] * n
    for k, weight in enumerate(weights):
        coming[-(-period // (weight * unit)) - 1].append(k)
    eligible: list[tuple[int, int]] = []  # (turn until which k must be served, k)
    for i in range(period):
        for k in coming[i]:
            # whole numbers in the order of fractions, which differ by 2^-34 (weights are below 2^17) or not at all
            deadline = (((drawn[k] + 1) * unit - 1) << 35) // weights[k]
            heapq.heappush(eligible, (deadline, k))
        _, k = heapq.heappop(eligible)
        out[i] = k
        drawn[k] += 1
        first = -(-(drawn[k] * unit + 1) * period // (weights[k] * unit)) - 1  # rounded up
        coming[min(max(first, i + 1), period)].append(k)
    return out


class Blend:
    """Answers, for any sample number, which source it comes from and its number within that source."""

    def __init__(self, weights: list[float]):
        self.weights = whole_weights(weights)
        self.period = sum(self.weights)
        self.source = chairman_assignment(self.weights)  # [period]
        self.rank = np.empty(self.period, np.int32)  # [period], samples of the same source earlier in the period
        ends = np.cumsum(self.weights)  # source k has turns [ends[k - 1], ends[k]) of the turns sorted by source
        self.rank[np.argsort(self.source, kind="stable")] = np.arange(self.period) - np.repeat(
            ends - self.weights, self.weights
        )
        self._weights = np.array(self.weights, np.int64)

    def __call__(self, sample: int) -> tuple[int, int]:
        """(source, sample number within the source)."""
        turn, at = divmod(sample, self.period)
        source = int(self.source[at])
        return source, turn * self.weights[source] + int(self.rank[at])

    def many(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sources and numbers within them of many samples: int64 [m] -> int32 [m], int64 [m]."""
        turn, at = np.divmod(samples, self.period)
        source = self.source[at]
        return source, turn * self._weights[source] + self.rank[at]

    def drawn(self, samples: int) -> list[int]:
        """How many of the first `samples` come from each source."""
        turns, rest = divmod(samples, self.period)
        head = np.bincount(self.source[:rest], minlength=len(self.weights))
        return [turns * weight + int(more) for weight, more in zip(self.weights, head, strict=True)]
