"""What tasks of a step run in these tests: `python -m tests.slurm.program CASE`."""

import os
import sys
import time
from pathlib import Path

import torch

from megatron_taipan.errors import UserError
from megatron_taipan.parallel import waiting
from megatron_taipan.parallel.processes import device_of_process, find_place
from megatron_taipan.train.distributed import start_processes


def meet() -> None:
    """Joins the run as the trainer does, and stays in it for a while."""
    start_processes(find_place(os.environ), torch.device("cpu"), 30)
    print("met", flush=True)
    # until the other step of the test has met too: only then did both ports exist at once
    Path(f"met{os.environ['SLURM_STEP_ID']}").touch()
    end = time.monotonic() + 30
    while len(list(Path().glob("met*"))) < 2 and time.monotonic() < end:
        time.sleep(0.1)


def wait() -> None:
    waiting.SAY_EVERY_S = 1.0
    start_processes(find_place(os.environ), torch.device("cpu"), 3)


def gpu() -> None:
    """Which GPU a task would take, by its number on the node; torch is told what a driver would tell it."""
    visible = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: len(visible)
    device = device_of_process(find_place(os.environ))
    print(f"rank {os.environ['SLURM_PROCID']} takes {visible[device.index]}", flush=True)


if __name__ == "__main__":
    status = 0
    try:
        {"meet": meet, "wait": wait, "gpu": gpu}[sys.argv[1]]()
    except UserError as error:
        print(f"error: {error}", flush=True)
        status = error.exit_status
    os._exit(status)
