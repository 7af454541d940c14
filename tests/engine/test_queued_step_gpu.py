"""On a GPU: train_step returns while AdamW still runs, and what it left is bit for bit what the waiting step leaves."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from megatron_taipan.train.loop import to_device
from tests.distributed.launch import launch
from tests.engine.test_queued_step import BAD, check, trained

pytestmark = pytest.mark.gpu
SLEEP = 200_000_000  # cycles of the GPU before each group's AdamW, about 0.1 s: the host is done long before


@contextmanager
def no_waiting() -> Iterator[None]:
    """AdamW takes long, and torch raises where the host would wait for the device; the update must still run after."""
    adamw = torch._fused_adamw_

    def slow(*args, **kwargs):
        torch.cuda._sleep(SLEEP)
        return adamw(*args, **kwargs)

    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with mock.patch.object(torch, "_fused_adamw_", slow):
            yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not torch.cuda.current_stream().query(), "train_step waited for AdamW"


def both_ways_on_gpu() -> dict[str, tuple[dict, dict]]:
    from megatron_taipan.parallel.processes import device_of_process, find_place
    from megatron_taipan.train.distributed import start_processes

    place = find_place(os.environ)
    start_processes(place, device_of_process(place), 120)
    return {
        name: (trained("cuda", bad, queued=True, around=no_waiting), trained("cuda", bad, queued=False))
        for name, bad in BAD.items()
    }


def test_the_host_returns_while_adamw_runs_and_finds_the_same_state():
    check(launch(1, both_ways_on_gpu, on_gpu=True, join=False, timeout=280))


def test_a_batch_is_sent_while_the_gpu_is_busy():
    batch = {"tokens": torch.arange(2**20), "loss_mask": torch.rand(2**20)}
    to_device(batch, torch.device("cuda"))  # takes pinned memory, which waits the first time
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    sent = to_device(batch, torch.device("cuda"))
    assert not torch.cuda.current_stream().query(), "to_device waited for the kernel before it"
    for name, values in batch.items():
        assert torch.equal(sent[name].cpu(), values), name
