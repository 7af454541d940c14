"""`python -m checkpoints.inspector PATH`: what a checkpoint or a folder of weights holds, its tensors unread."""

import argparse
import math
import sys
from pathlib import Path

from megatron_taipan.checkpoint.folder import WEIGHTS, checkpoints, incomplete, locate, read_manifest
from megatron_taipan.checkpoint.metadata import read_metadata
from megatron_taipan.checkpoint.weights import CheckpointWeights, ExportedWeights, Stored, is_export, open_weights
from megatron_taipan.errors import UserError
from megatron_taipan.parameters import parameter_table
from megatron_taipan.programs import exits_cleanly


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program."""
    parser = argparse.ArgumentParser(prog="python -m checkpoints.inspector", description=__doc__)
    parser.add_argument("path", type=Path, help="a checkpoint, a run's folder of checkpoints, or a folder of weights")
    parser.add_argument(
        "--tensors",
        action="store_true",
        help="one line a tensor instead of a tree in which equal layers share a branch",
    )
    options = parser.parse_args(arguments)
    path: Path = options.path
    if not path.is_dir():
        raise UserError(f"{path} is not a folder")
    for line in run_lines(path):
        print(line)
    if not is_export(path):
        path = locate(str(path))
        for label, value in checkpoint_facts(path):
            print(f"{label:<12}{value}")
    opened = open_weights(path)
    for line in tensor_lines(opened, options.tensors):
        print(line)
    return 0


def run_lines(path: Path) -> list[str]:
    """The checkpoints of a run's folder, oldest first, each complete or with the reason why not."""
    found = sorted([*checkpoints(path), *checkpoints(path, WEIGHTS)], key=lambda p: p.name.rpartition("_")[2])
    lines = [f"{folder.name}  {incomplete(folder) or 'complete'}" for folder in found]
    return [*lines, ""] if lines else []


def checkpoint_facts(path: Path) -> list[tuple[str, str]]:
    """Step, layout, versions and size of one checkpoint."""
    metadata, files = read_metadata(path), read_manifest(path)
    progress, identity = metadata["progress"], metadata["identity"]
    layout = ", ".join(f"{k} {v}" for k, v in metadata.get("layout", {}).items())
    size = sum(n_bytes for n_bytes, _ in files.values())
    return [
        ("checkpoint", str(path)),
        ("complete", f"{len(files)} files, {size:,} bytes; contents: python -m checkpoints.verify"),
        ("contents", "weights only" if metadata.get("contents") == WEIGHTS else "everything that a resumed run needs"),
        ("progress", ", ".join(f"{k} {v:,}" for k, v in progress.items() if isinstance(v, int))),
        ("layout", layout),
        ("precision", str(identity.get("train.precision", "unknown"))),
        ("versions", ", ".join(f"{k} {v}" for k, v in metadata.get("versions", {}).items())),
        ("git commit", str(metadata.get("git_commit"))),
        ("data", str(identity.get("data.fingerprint"))),
    ]


def tensor_lines(opened: ExportedWeights | CheckpointWeights, every: bool) -> list[str]:
    """Shape, stored type and size of every tensor: one a line, or as a tree in which equal layers are shown once."""
    table, names = parameter_table(opened.network), opened.names()
    stored = {name: opened.stored(name) for name in names}
    total = sum(math.prod(spec.shape) for spec in table.values())
    fp32_params = f"{sum(spec.float32 for spec in table.values())} of them float32 parameters"
    lines = [f"network     {opened.network.pattern}: {total:,} parameters in {len(table)} tensors, {fp32_params}"]
    if isinstance(opened, CheckpointWeights):
        less = sum(opened.moments_of(name) != opened.moments for name in table)
        muon = f", without {opened.moments[-1]} of the {less} matrices that Muon steps" if less else ""
        kinds = "".join(f", {kind}" for kind in opened.moments)
        lines.append(f"held        float32 masters{kinds} of each parameter{muon}")
    if every:
        return lines + [f"    {name:<44} {columns(*tensor)}" for name, tensor in stored.items()]
    return lines + tree_lines(stored)


def tree_lines(stored: dict[str, Stored]) -> list[str]:
    """The tensors as a tree by the dots of their names; layers with the same tensors share one branch."""
    plain: dict[str, Stored] = {}
    layers: dict[int, dict[str, Stored]] = {}
    for name, tensor in stored.items():
        if name.startswith("layers."):
            _, index, rest = name.split(".", 2)
            layers.setdefault(int(index), {})[rest] = tensor
        else:
            plain[name] = tensor
    alike: dict[tuple, list[int]] = {}
    for number, held in layers.items():
        alike.setdefault(tuple(held.items()), []).append(number)
    lines = branch({name: t for name, t in plain.items() if name.startswith("embedding.")}, 1)
    for inside, indices in alike.items():
        size = sum(tensor.n_bytes for _, tensor in inside)
        lines.append(f"    layers.{{{','.join(map(str, indices))}}}  {len(indices)} x {decimal(size)}")
        lines += branch(dict(inside), 2)
    return lines + branch({name: t for name, t in plain.items() if not name.startswith("embedding.")}, 1)


def branch(tensors: dict[str, Stored], depth: int) -> list[str]:
    """One level of the tree and what is below it."""
    inner: dict[str, dict[str, Stored]] = {}
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".")
        inner.setdefault(head, {})[rest] = tensor
    lines = []
    for head, below in inner.items():
        indent = "    " * depth
        if list(below) == [""]:
            lines.append(f"{indent + head:<40} {columns(*below[''])}")
        else:
            lines += [indent + head, *branch(below, depth + 1)]
    return lines


def columns(shape: tuple[int, ...], dtype: str, n_bytes: int) -> str:
    """Shape, type and size in columns."""
    return f"{str(list(shape)):<18} {dtype:<5} {decimal(n_bytes):>10}"


def decimal(n_bytes: int) -> str:
    """1,234,567 as `1.2 MB`."""
    size, units = float(n_bytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" else f"{size:.1f} {units[0]}"


if __name__ == "__main__":
    sys.exit(main())
