"""What selective recomputation keeps of products between tensor ranks: their results, communication included.

torch's selective checkpointing keeps the outputs of single operators, so it would keep a product and send its tokens
again. And a product in chunks is many operators, each of which it would count.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor


class RecomputeCache:
    """Results of the checkpointed segment that runs now, by the order in which they are asked for."""

    def __init__(self) -> None:
        self.segment: Segment | None = None

    def __call__(self, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """compute(), or where a segment is computed again what it gave the first time; outside of autograd."""
        return compute() if self.segment is None else self.segment.result(compute)

    def checkpointed(self, run: Callable[..., Any]) -> Callable[..., Any]:
        """run for torch's checkpoint: called first in the forward pass, and again in the backward pass."""
        segment = Segment()

        def segment_run(*args: Any) -> Any:
            segment.begin()
            before, self.segment = self.segment, segment
            try:
                return run(*args)
            finally:  # torch ends the second run by an exception
                self.segment = before

        return segment_run


class Segment:
    """The results of one segment, each with the number of changes in place that its tensor had seen."""

    def __init__(self) -> None:
        self.runs = 0
        self.results: deque[list[tuple[Tensor, int]]] = deque()

    def begin(self) -> None:
        """The segment runs: the first time to keep results, the second time to take them out.

        Raises:
            RuntimeError: it runs a third time.
        """
        if self.runs == 2:
            raise RuntimeError("a second backward pass through layers under selective recomputation")
        self.runs += 1

    def result(self, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What is kept when it is first asked for, and taken out when it is asked for again.

        Raises:
            RuntimeError: it has been changed in place meanwhile.
        """
        if self.runs == 1:
            from torch.utils._python_dispatch import _disable_current_modes  # torch's own, so only where it is needed

            with _disable_current_modes():  # the checkpoint's mode would count operators that do not come again
                results = compute()
            # aliases: autograd makes the results part of a graph that holds this segment
            self.results.append([(t.detach(), t._version) for t in results])
            return results
        kept = self.results.popleft()
        if any(t._version != version for t, version in kept):
            raise RuntimeError("a product that selective recomputation keeps has been changed in place")
        return tuple(t for t, _ in kept)
