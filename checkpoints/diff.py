"""`python -m checkpoints.diff A B`: which settings and which tensors of two checkpoints or folders differ, and how far.

Tensors are merged to the whole model first, so checkpoints of different layouts can be compared, and a checkpoint with
its export. Exit status 0 where all tensors are bit-equal, 1 where not.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoints.opening import Opened, open_any, settings_of
from megatron_taipan.errors import exits_cleanly


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
    a, b = open_any(options.a), open_any(options.b)
    ours, theirs = settings_of(a), settings_of(b)
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name] != theirs[name]:
            print(f"{name}: {ours[name]} | {theirs[name]}")
    for label, only in (("A", set(a.names()) - set(b.names())), ("B", set(b.names()) - set(a.names()))):
        if only:
            print(f"only in {label}: {', '.join(sorted(only))}")
    common = [name for name in a.names() if name in set(b.names())]
    found = [d for d in (compare(name, a, b) for name in common) if d is not None]
    shown = sorted(found, key=lambda d: -d.relative)
    for d in shown if options.all else shown[:10]:
        print(f"{d.name}: {d.elements:,} elements differ, by at most {d.largest:.3e}, relative {d.relative:.3e}")
    print(f"{len(common) - len(found)} of {len(common)} common tensors are bit-equal")
    return 1 if found or len(common) < len(a.names()) or len(common) < len(b.names()) else 0


def compare(name: str, a: Opened, b: Opened) -> Difference | None:
    """How far two tensors are apart; None where they are bit-equal (NaN equals NaN)."""
    x, y = a.load(name).float(), b.load(name).float()
    if x.shape != y.shape:
        return Difference(name, torch.inf, torch.inf, max(x.numel(), y.numel()))
    differs = (x != y) & ~(x.isnan() & y.isnan())
    if not differs.any():
        return None
    gap = torch.where(differs, (x - y).abs(), 0).nan_to_num(nan=torch.inf)
    scale = x.double().norm().clamp(min=1e-300)
    return Difference(name, float(gap.max()), float(gap.double().norm() / scale), int(differs.sum()))


if __name__ == "__main__":
    sys.exit(main())
