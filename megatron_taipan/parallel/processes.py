"""Which process this is, and how the processes of a run find each other.

The same program starts under `deepspeed`, `torchrun`, `srun` or plain `python`: each sets its own environment
variables, and `find_place` reads them. Then they meet: the trainer by train/distributed.py:start_processes, which
starts DeepSpeed as well, other programs by `join_processes`.
"""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import wraps
from typing import NoReturn

import torch
import torch.distributed as dist

from megatron_taipan.errors import EXIT_UNREACHABLE, UserError
from megatron_taipan.parallel.waiting import Waiting
from megatron_taipan.programs import say_at_end, with_streams


class Unreachable(UserError):
    """The processes of the run did not find each other; another start may do better."""

    exit_status = EXIT_UNREACHABLE


@dataclass(frozen=True)
class RankInfo:
    """This process's rank among all processes of the run."""

    rank: int  # 0 <= rank < world_size
    world_size: int
    local_rank: int  # among the processes of this host; the number of its GPU
    local_size: int
    address: str  # where rank 0 listens
    port: int
    launcher: str  # who started us: "environment" (torchrun, deepspeed), "slurm" or "none"


def find_place(env: Mapping[str, str]) -> RankInfo:
    """Reads this process's rank from environment variables.

    torchrun and the deepspeed launcher set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Under srun they
    come from SLURM's variables; those of a *step* are asked for, because a batch script itself (outside srun) carries
    SLURM_PROCID and SLURM_NTASKS too, and would wait for tasks that never start.

    Raises:
        UserError: a variable is missing or not a number, or an MPI launcher started several processes.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        place = RankInfo(
            rank=_number(env, "RANK"),
            world_size=_number(env, "WORLD_SIZE"),
            local_rank=_number(env, "LOCAL_RANK", _number(env, "RANK")),
            local_size=_number(env, "LOCAL_WORLD_SIZE", _number(env, "LOCAL_SIZE", _number(env, "WORLD_SIZE"))),
            address=env.get("MASTER_ADDR", "127.0.0.1"),
            port=_number(env, "MASTER_PORT"),
            launcher="environment",
        )
    elif "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        place = RankInfo(
            rank=_number(env, "SLURM_PROCID"),
            world_size=_number(env, "SLURM_STEP_NUM_TASKS"),
            local_rank=_number(env, "SLURM_LOCALID"),
            local_size=int(
                env.get("SLURM_STEP_TASKS_PER_NODE", env["SLURM_STEP_NUM_TASKS"]).split("(")[0].split(",")[0]
            ),
            address=env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", ""))),
            port=_number(env, "MASTER_PORT", _slurm_port(env)),
            launcher="slurm",
        )
    else:
        refuse_mpi(env)
        place = RankInfo(0, 1, 0, 1, "127.0.0.1", free_port(), "none")
    if not 0 <= place.rank < place.world_size:
        raise UserError(f"rank {place.rank} is not among {place.world_size} processes (0 to {place.world_size - 1})")
    return place


def refuse_mpi(env: Mapping[str, str]) -> None:
    """Raises UserError if `mpirun` started several processes and its variables were not translated.

    They do not say where rank 0 listens, so each process would train alone (Open MPI, MPICH and MVAPICH).
    """
    for mpi in ("OMPI_COMM_WORLD_", "PMI_", "MV2_COMM_WORLD_"):
        if _number(env, f"{mpi}SIZE", 1) > 1:
            raise UserError(
                f"{mpi}SIZE={env[f'{mpi}SIZE']}: mpirun started this process, and says neither RANK nor where rank 0"
                " listens; start through torchrun, deepspeed or srun, or give every process RANK, WORLD_SIZE,"
                f" LOCAL_RANK (as RANK=${mpi}RANK), MASTER_ADDR and MASTER_PORT"
            )


def first_host(nodelist: str) -> str:
    """The first host of a SLURM node list: `gpu[003-005,9],login1` -> `gpu003`, `r[1-2]n[03-04]` -> `r1n03`.

    Raises:
        UserError: the list is empty.
    """
    if "[" in nodelist and (hosts := _expanded(nodelist)):
        return hosts[0]
    match = re.match(r"\s*((?:[^\[,\s]|\[[^\]]*\])+)", nodelist)
    if not match:
        raise UserError("SLURM names no host for this step (SLURM_STEP_NODELIST is empty); set MASTER_ADDR")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match.group(1))


def _expanded(nodelist: str) -> list[str]:
    """All hosts of a list as SLURM itself expands it; empty where its command is not installed or does not answer."""
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return listed.stdout.split()


def _slurm_port(env: Mapping[str, str]) -> int:
    """The same port for every task of a step, and another for each step, job (jobs may share a host) and restart.

    It stays below 32768, where Linux begins to take ports for outgoing connections.
    """
    job, step = _number(env, "SLURM_JOB_ID", 0), _number(env, "SLURM_STEP_ID", 0)
    return 20000 + (job + 1009 * step + 251 * _number(env, "SLURM_RESTART_COUNT", 0)) % 12000


def free_port() -> int:
    """A TCP port of this host that is not in use now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def device_of_process(place: RankInfo) -> torch.device:
    """This process's GPU, or the CPU where the host has none.

    Raises:
        UserError: there are GPUs, but fewer than processes on this host.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if visible == 1 and place.launcher == "slurm":
        # --gpus-per-task or --gpu-bind: every task sees its own GPU alone, unless the step has fewer GPUs than tasks
        if _number(os.environ, "SLURM_GPUS_ON_NODE", place.local_size) >= place.local_size:
            return torch.device("cuda", 0)
    if place.local_rank >= visible:
        raise UserError(
            f"process {place.local_rank} of this host has no GPU: {visible} GPUs are visible"
            f" (CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}); start one process per GPU"
        )
    return torch.device("cuda", place.local_rank)


@contextmanager
def meeting(place: RankInfo, timeout_s: float, option: str = "") -> Iterator[None]:
    """Around the call in which the processes meet: says what is waited for.

    Args:
        option: where timeout_s comes from, to name it to the user.

    Raises:
        Unreachable: the processes do not meet: rank 0's port is taken, or it is not reached in `timeout_s`.
    """
    waiting = Waiting(
        rank=place.rank, local_rank=place.local_rank, world_size=place.world_size, address=place.address,
        port=place.port, timeout_s=timeout_s, option=option,
    )  # fmt: skip
    try:
        with waiting:
            yield
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        if "EADDRINUSE" in str(error):
            raise Unreachable(
                f"rank 0 cannot listen on port {place.port} of {socket.gethostname()}, which another program uses; set"
                " MASTER_PORT to another one, the same for all processes"
            ) from error
        raise Unreachable(f"the processes did not meet: {waiting.describe()}") from error


def backend_of(device: torch.device) -> str:
    """torch's name of what carries the collectives."""
    return "nccl" if device.type == "cuda" else "gloo"


def join_processes(place: RankInfo, device: torch.device, timeout_s: float) -> None:
    """Joins the run without DeepSpeed. Every collective that takes longer than `timeout_s` ends the process.

    Raises:
        Unreachable: as `meeting`.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with meeting(place, timeout_s):
        dist.init_process_group(
            backend_of(device), init_method=f"tcp://{place.address}:{place.port}", rank=place.rank,
            world_size=place.world_size, timeout=timedelta(seconds=timeout_s),
        )  # fmt: skip


def stop_processes() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """Ends the process with this status, once everything is written and closed.

    Leaving the interpreter the ordinary way races with threads of torch's process groups, which want Python's lock
    while it is taken down: about one run in 15 on gloo ended in an abort, and its status 134 would have hidden ours.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # what does not fit on a full disk is lost, the status is not
            stream.flush()
    os._exit(status)


def finish(status: int) -> NoReturn:
    """Ends a program that may have joined others: as `leave` if it has, else as any program ends."""
    if dist.is_initialized():
        leave(status)
    sys.exit(status)


def report(error: UserError) -> int:
    """Prints the error once for the whole run, and gives the exit status.

    What every rank finds wrong, rank 0 says. Another rank cannot know whether it is alone with its error, as with data
    that it alone has read; it waits for rank 0 to end the run, and speaks only if that does not happen.
    """
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    if rank == "0":
        say_at_end(f"error: {error}")
    else:
        time.sleep(3)
        say_at_end(f"error on rank {rank}: {error}")
    return error.exit_status


def exits_cleanly_on_ranks(main: Callable[..., int]) -> Callable[..., int]:
    """`programs.exits_cleanly` of a program that several processes may run together: the error is printed once."""

    @wraps(main)
    def run(*args, **kwargs) -> int:
        try:
            return with_streams(lambda: main(*args, **kwargs))
        except UserError as error:
            return report(error)

    return run


def on_one_process(main: Callable[..., int]) -> Callable[..., int]:
    """Wraps the `main` of a program that cannot share its work out: as one of several processes it is refused, where
    each would do all of it and write over what the others wrote."""

    @exits_cleanly_on_ranks
    @wraps(main)
    def run(*args, **kwargs) -> int:
        if (started := find_place(os.environ).world_size) > 1:
            raise UserError(
                f"this program runs as one process, and {started} were started, each of which would do all of it; start"
                " it by python alone, with RANK and WORLD_SIZE unset, under SLURM by srun --ntasks=1"
            )
        return main(*args, **kwargs)

    return run


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None:
        if default is None:
            found = ", ".join(f"{k}={env[k]}" for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID") if k in env)
            raise UserError(
                f"the environment variable {name} is missing beside {found}; start through deepspeed or srun"
            )
        return default
    with suppress(ValueError):
        return int(text)
    raise UserError(f"the environment variable {name}={text!r} is not a whole number")
