"""A pseudo-random order of n things that is computed point by point and takes no memory.

A generalised Feistel network (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, method 3) permutes
the a * b >= n pairs (left, right); a result of n or more is fed in again until it falls below n ("cycle walking",
rarely needed since a * b < n + a). So the order of a billion samples costs nothing to make, any rank computes just
the entries that it reads, and an epoch is covered exactly once because the map is a bijection.
"""

from hashlib import blake2b
from math import isqrt

import numpy as np

MASK = (1 << 64) - 1
ROUNDS = 4  # each changes both halves


def derive_key(*parts: object) -> int:
    """A 64-bit key from any printable parts."""
    return int.from_bytes(blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest(), "little")


class Permutation:
    """A bijection of 0 .. n-1 chosen by a key."""

    def __init__(self, n: int, key: int):
        if n < 1:
            raise ValueError(f"a permutation needs n >= 1, not {n}")
        self.n = n
        self.a = isqrt(n - 1) + 1
        self.b = -(-n // self.a)
        self.keys = [derive_key(key, round) for round in range(2 * ROUNDS)]

    def __call__(self, index: int) -> int:
        """The `index`-th entry of the order."""
        while True:
            index = self._step(index)
            if index < self.n:
                return index

    def many(self, indices: np.ndarray) -> np.ndarray:
        """Several entries at once: int64 [m] -> int64 [m]."""
        out = self._step(indices.astype(np.uint64))
        while (outside := out >= self.n).any():
            out[outside] = self._step(out[outside])
        return out.astype(np.int64)

    def _step(self, x):
        """One pass through the network; the same arithmetic serves Python integers and uint64 arrays."""
        a, b, keys = self.a, self.b, self.keys
        left, right = x % a, x // a
        for round in range(0, 2 * ROUNDS, 2):
            left = (left + _mix(right, keys[round])) % a
            right = (right + _mix(left, keys[round + 1])) % b
        return right * a + left


def _mix(x, key: int):
    """A keyed hash to 32 bits (multiply, fold, multiply)."""
    x = ((x ^ key) * 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 29)) * 0xBF58476D1CE4E5B9) & MASK
    return x >> 32
