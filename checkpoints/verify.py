"""`python -m checkpoints.verify PATH`: reads every file of a checkpoint and compares it with its SHA-256."""

import argparse
import sys
from pathlib import Path

from megatron_taipan.checkpoint.folder import checkpoints, incomplete, read_manifest, wrong_hashes
from megatron_taipan.errors import UserError, exits_cleanly


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program; exit status 1 where a checkpoint is damaged."""
    parser = argparse.ArgumentParser(prog="python -m checkpoints.verify", description=__doc__)
    parser.add_argument("path", type=Path, help="a checkpoint, or a run's folder: then all of its checkpoints")
    options = parser.parse_args(arguments)
    folders = checkpoints(options.path) or [options.path]
    if not options.path.is_dir():
        raise UserError(f"{options.path} is no folder")
    damaged = 0
    for folder in folders:
        fault = fault_of(folder)
        print(f"{folder}  {fault or f'good ({len(read_manifest(folder))} files)'}", flush=True)
        damaged += fault is not None
    return 1 if damaged else 0


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint, None if nothing is."""
    fault = incomplete(folder)
    if fault is not None:
        return fault
    changed = wrong_hashes(folder, sorted(read_manifest(folder)))
    return f"changed since it was written: {', '.join(changed)}" if changed else None


if __name__ == "__main__":
    sys.exit(main())
