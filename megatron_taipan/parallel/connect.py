"""The groups of a run, as its configuration lays them out, and how the tensor ranks reach each other's memory."""

import socket
from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_taipan.parallel.all_ranks import gather_objects
from megatron_taipan.parallel.groups import Groups, build_groups
from megatron_taipan.parallel.mesh import fit_mesh
from megatron_taipan.parallel.overlapped_comm import Messages, OverlappedComm
from megatron_taipan.parallel.tensor import TensorParallel
from megatron_taipan.parallel_config import ParallelConfig


def connect(p: ParallelConfig, device: torch.device, seq_len: int) -> tuple[Groups, str]:
    """The groups, and for the log how tokens travel between tensor ranks ("" where there is one); collective.

    Args:
        seq_len: tokens of a row.

    Raises:
        UserError: the layout does not fit the number of processes.
    """
    mesh = fit_mesh(dist.get_world_size(), p)
    groups = build_groups(mesh, sequence_parallel=p.shards_tokens(seq_len), timeout_s=p.timeout_s)
    if not groups.tensor.sequence_parallel:
        return groups, "every tensor rank has all tokens" if p.tensor > 1 else ""
    comm, report = find_overlapped_comm(groups.tensor, p, device)
    return replace(groups, tensor=replace(groups.tensor, overlapped_comm=comm)), report


def find_overlapped_comm(
    tp: TensorParallel, p: ParallelConfig, device: torch.device
) -> tuple[OverlappedComm | None, str]:
    """The group's overlapped communication, or None; and for the log how tokens travel. The same on all its ranks."""
    if not p.overlap:
        return None, "tokens travel by collectives (parallel.overlap=false)"
    if device.type == "cpu":
        return Messages(tp.rank, tp.size, tp.group), "tokens travel in chunks"
    hosts = sorted(set(gather_objects(socket.gethostname(), tp.group)))
    if len(hosts) > 1:
        return None, f"tokens travel by collectives (a tensor group on hosts {', '.join(hosts)})"
    reason = ""
    try:
        from megatron_taipan.parallel.peer_memory import PeerMemory  # not every torch has symmetric memory

        comm = PeerMemory(tp.rank, tp.size, tp.group, timeout_s=p.timeout_s)
        comm.make_buffer(1, device)
    except (RuntimeError, ImportError) as error:
        reason = repr(error)
    reasons = gather_objects(reason, tp.group)
    if any(reasons):
        return None, f"tokens travel by collectives (symmetric memory: {next(filter(None, reasons))})"
    return comm, "tokens travel through the GPUs' memory"
