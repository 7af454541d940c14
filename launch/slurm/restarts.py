#!/usr/bin/env python
"""How many starts of a SLURM job in a row have ended without a new checkpoint: pretrain.sbatch asks at each one's end.

    python launch/slurm/restarts.py --config FILE [section.option=value ...]

takes the arguments of launch/pretrain.py and prints the number. What it has seen it keeps in the run's folder,
checkpoint.dir/slurm_restarts.json; another job begins to count from 0.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # this checkout, whichever one is installed

from megatron_taipan.checkpoint.files import write_text
from megatron_taipan.checkpoint.folder import find_newest, step_of
from megatron_taipan.config_loading import load_config
from megatron_taipan.errors import writing
from megatron_taipan.programs import exits_cleanly

MEMORY = "slurm_restarts.json"


@exits_cleanly
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    options = parser.parse_intermixed_args(arguments)
    config = load_config(options.config, options.overrides)
    print(starts_without_checkpoint(Path(config.checkpoint.dir), os.environ.get("SLURM_JOB_ID", "")))


def starts_without_checkpoint(directory: Path, job: str) -> int:
    """The number with the start that has just ended; 0 if that one brought a checkpoint.

    New is one of a later step than all before: what a run takes back and writes again is not progress. At the end of a
    job's first start any checkpoint counts as new, since there was no look before it.

    Raises:
        UserError: the folder cannot be written.
    """
    found = find_newest(directory)
    newest = (step_of(found.path) or 0) if found else 0
    before, count = remembered(directory / MEMORY, job)
    count = 0 if newest > before else count + 1
    with writing(directory / MEMORY):
        directory.mkdir(parents=True, exist_ok=True)
        write_text(directory / MEMORY, json.dumps({"job": job, "step": max(newest, before), "starts": count}) + "\n")
    return count


def remembered(file: Path, job: str) -> tuple[int, int]:
    """The last step with a checkpoint and the number of starts without one; zeros of another job or a damaged file."""
    try:
        memory = json.loads(file.read_text(encoding="utf-8"))
        return (int(memory["step"]), int(memory["starts"])) if memory["job"] == job else (0, 0)
    except (OSError, ValueError, KeyError, TypeError):
        return 0, 0


if __name__ == "__main__":
    sys.exit(main())
