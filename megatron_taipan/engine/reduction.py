"""Averages of gradients over data ranks, each on the rank that owns it, while the backward pass still runs."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 2**25  # elements reduced at once, 128 MiB: enough for the full bandwidth, and the first starts early
SMALL = 2**22  # elements; where a rank owns fewer, one all-reduce of many ranks' parts saves their latencies


@dataclass(eq=False)
class GradBucket:
    """Gradients that are reduced in one call."""

    values: Tensor  # float32 [n], a slice of a flat tensor
    owner: int | None  # rank in the data group that gets the average; None: all do
    params: list[nn.Parameter]  # whose gradients are in it, whole or in part
    missing: set[nn.Parameter]  # those of them that are not complete in this step
    work: Any = None  # of the collective, once it has started


class OverlappedReduction:
    """Starts the reduction of every bucket of the gradients as soon as it is complete.

    Collectives must start in the same order on all ranks, and gradients need not appear in the same order everywhere: a
    parameter may have none on one rank. So the order is fixed, from the model's last parameters to its first as the
    backward pass goes; a bucket waits for those before it, and `finish` starts the rest.

    A bucket is within one rank's partition (ZeRO-1: equal slices of each flat tensor) and is reduced to that rank,
    half of the bytes of an all-reduce.

    Args:
        flat: float32 gradients of each parameter group, in the layout of its flat weights. Averaged in place; on ranks
            that do not own a part, its contents are undefined afterwards.
        views: each parameter's gradient in them.
        groups: the parameters of each flat tensor.
        order: all parameters as the model lists them.
        process_group: the data ranks.
    """

    def __init__(
        self,
        flat: list[Tensor],
        views: dict[nn.Parameter, Tensor],
        groups: list[list[nn.Parameter]],
        order: Iterable[nn.Parameter],
        process_group: Any,
    ):
        self.process_group = process_group
        self.buckets: list[GradBucket] = []
        self.buckets_of: dict[nn.Parameter, list[GradBucket]] = {p: [] for p in views}
        self.started = 0  # buckets of this step
        size = dist.get_world_size(process_group)
        position = {p: k for k, p in enumerate(order)}
        for whole, params in zip(flat, groups, strict=True):
            for first, last, owner in bucket_bounds(whole.numel(), size):
                inside = [p for p in params if overlaps(views[p], first, last)]
                if inside:  # else it is padding, zero on all ranks
                    self.buckets.append(GradBucket(whole[first:last], owner, inside, set(inside)))
        # the earliest parameter of a bucket is the last one whose gradient appears
        self.buckets.sort(key=lambda r: (min(position[p] for p in r.params), r.values.storage_offset()), reverse=True)
        for bucket in self.buckets:
            for p in bucket.params:
                self.buckets_of[p].append(bucket)

    def has_begun(self, param: nn.Parameter) -> bool:
        """Whether some of the parameter's gradient is under way, so that nothing more may be added."""
        return any(bucket.work is not None for bucket in self.buckets_of[param])

    def complete(self, param: nn.Parameter) -> None:
        """The parameter's gradient is final in this step."""
        for bucket in self.buckets_of[param]:
            bucket.missing.discard(param)
        while self.started < len(self.buckets) and not self.buckets[self.started].missing:
            self._start_next()

    def finish(self) -> None:
        """Starts the rest, and waits for everything (on a GPU its stream does, not the process)."""
        while self.started < len(self.buckets):
            self._start_next()
        for bucket in self.buckets:
            bucket.work.wait()
            bucket.work = None
            bucket.missing = set(bucket.params)
        self.started = 0

    def _start_next(self) -> None:
        """NCCL's kernel waits for what was queued on the current stream so far, so for the gradients."""
        bucket = self.buckets[self.started]
        self.started += 1
        options: dict[str, Any] = {"op": dist.ReduceOp.AVG, "group": self.process_group, "async_op": True}
        if bucket.owner is None:
            bucket.work = dist.all_reduce(bucket.values, **options)
        else:
            bucket.work = dist.reduce(bucket.values, group_dst=bucket.owner, **options)


def bucket_bounds(length: int, size: int) -> list[tuple[int, int, int | None]]:
    """(first, end, owner) of the buckets of a flat tensor that `size` ranks own in equal slices."""
    part = length // size
    if part < SMALL:
        return [(first, min(first + BUCKET, length), None) for first in range(0, length, BUCKET)]
    return [
        (first, min(first + BUCKET, (owner + 1) * part), owner)
        for owner in range(size)
        for first in range(owner * part, (owner + 1) * part, BUCKET)
    ]


def overlaps(view: Tensor, first: int, last: int) -> bool:
    """Whether some of a view's elements are among the elements [first, last) of its flat tensor."""
    return view.storage_offset() < last and view.storage_offset() + view.numel() > first and view.numel() > 0
