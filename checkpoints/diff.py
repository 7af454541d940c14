"""`python -m checkpoints.diff A B`: which settings and which tensors of two checkpoints or folders differ, and how far.

Tensors are merged to the whole model first, so checkpoints of different layouts can be compared, and a checkpoint with
its export; the optimizer's moments too where both have them. Exit status 0 where all are bit-equal, 1 where not.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_taipan.checkpoint.metadata import SCHEDULED, dotted_settings
from megatron_taipan.checkpoint.weights import CheckpointWeights, ExportedWeights, open_weights
from megatron_taipan.programs import exits_cleanly


@dataclass(frozen=True)
class Difference:
    """Of one tensor, in float32."""

    name: str
    largest: float  # largest absolute difference of an element; inf where shapes or finiteness differ
    relative: float  # the norm of the difference by the norm of A's tensor
    elements: int  # that differ


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program."""
    parser = argparse.ArgumentParser(prog="python -m checkpoints.diff", description=__doc__.split("\n\n")[0])
    parser.add_argument("a", type=Path)
    parser.add_argument("b", type=Path)
    parser.add_argument("--all", action="store_true", help="every tensor that differs, not the ten that differ most")
    options = parser.parse_args(arguments)
    a, b = open_weights(options.a), open_weights(options.b)
    before, after = known_settings(a), known_settings(b)
    for name in sorted(before.keys() & after.keys()):
        if before[name] != after[name]:
            print(f"{name}: {before[name]} | {after[name]}")
    ours, theirs = tensors_of(a, with_moments=has_moments(b)), tensors_of(b, with_moments=has_moments(a))
    for label, only in (("A", ours.keys() - theirs.keys()), ("B", theirs.keys() - ours.keys())):
        if only:
            print(f"only in {label}: {', '.join(sorted(only))}")
    if has_moments(a) != has_moments(b):
        print(f"only in {'A' if has_moments(a) else 'B'}: the optimizer's moments")
    common = [name for name in ours if name in theirs]
    found = [d for d in (tensor_difference(name, ours[name](), theirs[name]()) for name in common) if d is not None]
    shown = sorted(found, key=lambda d: -d.relative)
    for d in shown if options.all else shown[:10]:
        print(f"{d.name}: {d.elements:,} elements differ, by at most {d.largest:.3e}, relative {d.relative:.3e}")
    print(f"{len(common) - len(found)} of {len(common)} common tensors are bit-equal")
    return 1 if found or len(common) < max(len(ours), len(theirs)) else 0


def known_settings(opened: ExportedWeights | CheckpointWeights) -> dict[str, Any]:
    """All settings that are known to have made the weights, by dotted name; a schedule is one setting."""
    if isinstance(opened, ExportedWeights):
        return dotted_settings({"model": opened.network.model_dump(mode="json")}, whole=SCHEDULED)
    return dotted_settings(opened.config.model_dump(mode="json"), whole=SCHEDULED) | {"step": opened.step}


def has_moments(opened: ExportedWeights | CheckpointWeights) -> bool:
    """Whether the optimizer's state is there too."""
    return isinstance(opened, CheckpointWeights) and bool(opened.moments)


def tensors_of(opened: ExportedWeights | CheckpointWeights, *, with_moments: bool) -> dict[str, Callable[[], Tensor]]:
    """What can be compared, by name; each is read when called."""
    tensors: dict[str, Callable[[], Tensor]] = {name: partial(opened.load, name) for name in opened.names()}
    if with_moments and isinstance(opened, CheckpointWeights):
        for kind in opened.moments:
            names = [name for name in opened.reader.table if kind in opened.moments_of(name)]
            tensors |= {f"{name} ({kind})": partial(opened.load_moment, name, kind) for name in names}
    return tensors


def tensor_difference(name: str, x: Tensor, y: Tensor) -> Difference | None:
    """How far two tensors are apart; None where they are bit-equal (NaN equals NaN)."""
    x, y = x.float(), y.float()
    if x.shape != y.shape:
        return Difference(name, torch.inf, torch.inf, max(x.numel(), y.numel()))
    differs = (x != y) & ~(x.isnan() & y.isnan())
    if not differs.any():
        return None
    gap = torch.where(differs, (x - y).abs(), 0).nan_to_num(nan=torch.inf, posinf=torch.inf)
    scale = x.double().norm().clamp(min=1e-300)
    return Difference(name, float(gap.max()), float(gap.double().norm() / scale), int(differs.sum()))


if __name__ == "__main__":
    sys.exit(main())
