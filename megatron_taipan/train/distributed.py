"""How the processes of a training run start; parallel/processes.py says which of them this one is."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_taipan.engine.startup import import_deepspeed
from megatron_taipan.parallel.processes import RankInfo, backend_of, meeting

OMPI_LOCAL = "OMPI_COMM_WORLD_LOCAL_RANK"


def start_processes(place: RankInfo, device: torch.device, timeout_s: float) -> None:
    """Joins the run: gloo on CPU, NCCL on GPU. Every collective that takes longer than `timeout_s` ends the process.

    Raises:
        Unreachable: the processes do not meet: rank 0's port is taken, or it is not reached in `timeout_s`.
    """
    os.environ.update(
        RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        LOCAL_RANK=str(device.index if device.type == "cuda" else place.local_rank),  # DeepSpeed's number of the GPU
        LOCAL_SIZE=str(place.local_size),  # what DeepSpeed's CPU accelerator takes for the number of devices
        MASTER_ADDR=place.address,
        MASTER_PORT=str(place.port),
    )
    if OMPI_LOCAL in os.environ:  # from an outer mpirun; DeepSpeed fails where it is not LOCAL_RANK
        os.environ[OMPI_LOCAL] = str(place.local_rank)
    deepspeed = import_deepspeed(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with meeting(place, timeout_s, "parallel.timeout_s"):
        deepspeed.init_distributed(
            dist_backend=backend_of(device),
            auto_mpi_discovery=False,
            timeout=timedelta(seconds=timeout_s),
            verbose=False,
        )


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on any rank; collective."""
    if not dist.is_initialized():
        return flag
    raised = torch.tensor([float(flag)], device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())
