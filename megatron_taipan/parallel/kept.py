"""What selective recomputation keeps of products between tensor ranks: their results, whatever was sent for them.

torch's selective checkpointing keeps the outputs of single operators, so it would keep a product and send its tokens
once more. And a product in pieces is many operators, which it would count.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class Kept:
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
            before, self.segment = self.segment, segment
            try:
                return run(*args)
            finally:  # torch ends the second run by an exception
                self.segment = before
                segment.again = True

        return segment_run


class Segment:
    """The results of one segment."""

    def __init__(self) -> None:
        self.again = False
        self.results: deque[tuple[Tensor, ...]] = deque()

    def result(self, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What is kept when it is first asked for, and taken out when it is asked for again.

        Raises:
            RuntimeError: it has been taken before: by a second backward pass.
        """
        if not self.again:
            with _disable_current_modes():  # torch's checkpointing would count operators that do not come again
                results = compute()
            self.results.append(tuple(t.detach() for t in results))  # autograd makes these here part of its graph
            return results
        if not self.results:
            raise RuntimeError("a second backward pass through layers under selective recomputation")
        return self.results.popleft()
