"""`python -m checkpoints.verify PATH`: reads every file of a checkpoint or export and compares it with its SHA-256."""

import argparse
import sys
from pathlib import Path

from checkpoints.checksums import changed_files, read_sums
from megatron_taipan.checkpoint.folder import WEIGHTS, checkpoints, read_manifest
from megatron_taipan.checkpoint.verification import damage
from megatron_taipan.checkpoint.weights import is_export
from megatron_taipan.errors import UserError
from megatron_taipan.programs import exits_cleanly


@exits_cleanly
def main(arguments: list[str] | None = None) -> int:
    """The command line program; exit status 1 where something is damaged."""
    parser = argparse.ArgumentParser(prog="python -m checkpoints.verify", description=__doc__)
    parser.add_argument("path", type=Path, help="a checkpoint, a run's folder (all of its checkpoints), an export")
    options = parser.parse_args(arguments)
    if is_export(options.path):
        return verify_export(options.path)
    folders = [*checkpoints(options.path), *checkpoints(options.path, WEIGHTS)] or [options.path]
    if not options.path.is_dir():
        raise UserError(f"{options.path} is not a folder")
    damaged = 0
    for folder in folders:
        fault = damage(folder)
        print(f"{folder}  {fault or f'good ({len(read_manifest(folder))} files)'}", flush=True)
        damaged += fault is not None
    return 1 if damaged else 0


def verify_export(folder: Path) -> int:
    """Prints each difference from SHA256SUMS; the exit status."""
    faults = changed_files(folder)
    for fault in faults:
        print(f"{folder}  {fault}", flush=True)
    if not faults:
        print(f"{folder}  good ({len(read_sums(folder))} files)")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
