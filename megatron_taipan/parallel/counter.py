"""Counts what the tensor-parallel collectives send."""

from collections import Counter


class CommCounter:
    """Calls and payload bytes by collective, since the last reset.

    The payload is the size of the tensor that the collective works on as a whole: the reduced tensor of an
    all-reduce, the full (gathered) tensor of an all-gather or reduce-scatter.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def add(self, collective: str, n_bytes: int) -> None:
        self.calls[collective] += 1
        self.bytes[collective] += n_bytes

    def reset(self) -> None:
        self.calls.clear()
        self.bytes.clear()
