"""`python -m checkpoints.inspect PATH`: what a checkpoint or a folder of weights holds, without reading its tensors."""

import argparse
import math
import sys
from pathlib import Path

from checkpoints.opening import open_any
from checkpoints.transplant import group_layers
from megatron_taipan.checkpoint.folder import checkpoints, incomplete, locate, read_manifest, read_metadata
from megatron_taipan.checkpoint.merge import TrainedState
from megatron_taipan.checkpoint.weights import Weights
from megatron_taipan.errors import UserError, exits_cleanly
from megatron_taipan.parallel.layout import describe


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program."""
    parser = argparse.ArgumentParser(prog="python -m checkpoints.inspect", description=__doc__)
    parser.add_argument("path", type=Path, help="a checkpoint, a run's folder of checkpoints, or a folder of weights")
    parser.add_argument("--tensors", action="store_true", help="one line a tensor instead of one a kind of layer")
    options = parser.parse_args(arguments)
    path: Path = options.path
    if not path.is_dir():
        raise UserError(f"{path} is no folder")
    for line in run_lines(path):
        print(line)
    if not (path / "config.json").is_file():
        path = locate(str(path))
        for label, value in checkpoint_facts(path):
            print(f"{label:<12}{value}")
    opened = open_any(path)
    for line in tensor_lines(opened, options.tensors):
        print(line)
    return 0


def run_lines(path: Path) -> list[str]:
    """The checkpoints of a run's folder, oldest first, each complete or with the reason why not."""
    found = checkpoints(path)
    lines = [f"{folder.name}  {incomplete(folder) or 'complete'}" for folder in found]
    return [*lines, ""] if lines else []


def checkpoint_facts(path: Path) -> list[tuple[str, str]]:
    """Step, layout, versions and size of one checkpoint."""
    metadata, files = read_metadata(path), read_manifest(path)
    progress, identity = metadata["progress"], metadata["identity"]
    layout = ", ".join(f"{k.removeprefix('layout.')} {v}" for k, v in identity.items() if k.startswith("layout."))
    layout = layout or ", ".join(f"{k} {v}" for k, v in metadata.get("layout", {}).items())
    size = sum(n_bytes for n_bytes, _ in files.values())
    return [
        ("checkpoint", str(path)),
        ("complete", f"{len(files)} files, {size:,} bytes; contents: python -m checkpoints.verify"),
        ("progress", ", ".join(f"{k} {v:,}" for k, v in progress.items() if isinstance(v, int))),
        ("layout", layout),
        ("precision", str(identity.get("train.precision", "unknown"))),
        ("versions", ", ".join(f"{k} {v}" for k, v in metadata.get("versions", {}).items())),
        ("git commit", str(metadata.get("git_commit"))),
        ("data", str(identity.get("data.fingerprint"))),
    ]


def tensor_lines(opened: Weights | TrainedState, every: bool) -> list[str]:
    """Names and shapes: one a line, or equal layers together."""
    network = opened.network if isinstance(opened, Weights) else opened.config.model
    shapes = {name: spec.shape for name, spec in describe(network).items()}
    names = opened.names()
    n_islands = sum(spec.float32 for spec in describe(network).values())
    total = sum(math.prod(shape) for shape in shapes.values())
    islands = f"{n_islands} of them float32 islands"
    lines = [f"network     {network.pattern}: {total:,} parameters in {len(shapes)} tensors, {islands}"]
    missing = [name for name in shapes if name not in names]
    if missing:
        raise UserError(f"{opened.path} lacks {len(missing)} tensors of its network: {', '.join(missing[:5])}")
    if every:
        return lines + [f"    {name:<44} {list(shapes.get(name, ()))}" for name in names]
    return lines + [f"    {group}" for group in group_layers(names)]


if __name__ == "__main__":
    sys.exit(main())
