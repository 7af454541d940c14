"""`python -m checkpoints.verify PATH`: reads every file of a checkpoint and compares it with its SHA-256."""

import argparse
import sys
from pathlib import Path

from megatron_taipan.checkpoint.folder import WEIGHTS, checkpoints, read_manifest
from megatron_taipan.checkpoint.verification import damage
from megatron_taipan.errors import UserError, exits_cleanly


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program; exit status 1 where a checkpoint is damaged."""
    parser = argparse.ArgumentParser(prog="python -m checkpoints.verify", description=__doc__)
    parser.add_argument("path", type=Path, help="a checkpoint, or a run's folder: then all of its checkpoints")
    options = parser.parse_args(arguments)
    folders = [*checkpoints(options.path), *checkpoints(options.path, WEIGHTS)] or [options.path]
    if not options.path.is_dir():
        raise UserError(f"{options.path} is no folder")
    damaged = 0
    for folder in folders:
        fault = damage(folder)
        print(f"{folder}  {fault or f'good ({len(read_manifest(folder))} files)'}", flush=True)
        damaged += fault is not None
    return 1 if damaged else 0


if __name__ == "__main__":
    sys.exit(main())
