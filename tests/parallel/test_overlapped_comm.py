"""Chunks between ranks: every rank gets what the others sent, in any order of transfers and replays."""

import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.common import recorded
from megatron_taipan.parallel.connect import connect
from megatron_taipan.parallel.overlapped_comm import Fetch, OverlappedComm
from megatron_taipan.parallel.peer_memory import PeerMemory
from megatron_taipan.parallel_config import ParallelConfig
from tests.distributed.launch import launch
from tests.parallel.shared_file import pretended_gpus


def overlapped_comm_of(device: torch.device) -> OverlappedComm:
    config = ParallelConfig(tensor=dist.get_world_size(), sequence=True, timeout_s=60)
    groups, report = connect(config, device, 64)
    assert groups.tensor.overlapped_comm is not None, report
    return groups.tensor.overlapped_comm


def chunk_of(
    rank: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, salt: int = 0
) -> torch.Tensor:
    """What a rank holds; small whole numbers, so that sums are exact in every type."""
    generator = torch.Generator().manual_seed(100 * salt + rank)
    return torch.randint(-8, 9, shape, generator=generator).to(device, dtype)


def gathered(comm: OverlappedComm, mine: torch.Tensor) -> torch.Tensor:
    """All chunks, by way of both things that `gather` offers, which must agree."""
    used = mine.new_empty(comm.size * len(mine), *mine.shape[1:])
    chunks = used.chunk(comm.size)
    whole = comm.gather(mine, lambda rank, chunk: chunks[rank].copy_(chunk), torch.clone)
    return torch.stack([whole, used])


def scattered(comm: OverlappedComm, parts: torch.Tensor) -> torch.Tensor:
    """The ranks' sum of parts[this rank], which stays as it is."""
    before = parts.clone()
    total = comm.scatter(lambda rank: parts[rank])
    assert torch.cuda.is_available() or torch.equal(parts, before)  # a comparison cannot be recorded
    return total


def overlapping(
    comm: OverlappedComm, mine: torch.Tensor, parts: torch.Tensor, pause: Callable[[], object] = lambda: None
) -> tuple[torch.Tensor, torch.Tensor]:
    """All chunks, and the ranks' sum of parts[this rank]: two exchanges at once, as where a block is entered."""
    fetch, whole = Fetch(comm, mine), []

    def meanwhile() -> None:
        pause()
        chunks = fetch.whole()
        pause()  # used later than others may want to write there again
        whole.append(chunks.clone())
        fetch.end()

    total = comm.scatter(lambda rank: parts[rank], meanwhile, lambda total: total.add_(parts[comm.rank]))
    return whole[0], total


def check_all(comm: OverlappedComm, device: torch.device, pause: Callable[[], object] = lambda: None) -> None:
    """Sizes that grow and shrink, types that change, in the same order on every rank."""
    rank, size = comm.rank, comm.size
    for salt, (shape, dtype) in enumerate(
        [((3, 5), torch.float32), ((7, 11), torch.float64), ((64, 33), torch.bfloat16), ((2, 2), torch.float32)] * 3
    ):
        chunks = [chunk_of(r, shape, dtype, device, salt) for r in range(size)]
        parts = [chunk_of(r, (size * shape[0], shape[1]), dtype, device, 50 + salt) for r in range(size)]
        parts = [part.view(size, *shape) for part in parts]
        expected = torch.cat(chunks), sum(part[rank] for part in parts)
        whole, used = gathered(comm, chunks[rank])
        both = overlapping(comm, chunks[rank], parts[rank], pause)
        assert torch.equal(whole, expected[0]) and torch.equal(used, whole)
        assert torch.equal(scattered(comm, parts[rank]), expected[1])
        assert torch.equal(both[0], expected[0]) and torch.equal(both[1], expected[1])


def on_cpu() -> bool:
    check_all(overlapped_comm_of(torch.device("cpu")), torch.device("cpu"))
    return True


@pytest.mark.parametrize("size", [2, 4])
def test_every_piece_arrives_through_messages(size):
    assert launch(size, on_cpu) == [True] * size


def reports() -> list[str]:
    """How tokens travel, for the log, in each way that a CPU knows."""
    options = [{}, {"overlap": False}, {"sequence": False}, {"tensor": 1}]
    return [connect(ParallelConfig(**{"tensor": 2} | more), torch.device("cpu"), 64)[1] for more in options]


def test_log_says_how_tokens_travel():
    chunks, collectives, whole, alone = launch(2, reports)[0]
    assert chunks == "tokens travel in chunks" and "parallel.overlap=false" in collectives
    assert whole == "every tensor rank has all tokens" and alone == ""


def in_shared_file(folder: str) -> bool:
    """The GPUs' way of doing it, ranks out of step."""
    rank, size, delays = dist.get_rank(), dist.get_world_size(), random.Random(dist.get_rank())
    with pretended_gpus(Path(folder), rank, size):
        comm = PeerMemory(rank, size, None, timeout_s=20)
        for _ in range(5):
            time.sleep(delays.random() / 20)
            check_all(comm, torch.device("cpu"), lambda: time.sleep(delays.random() / 500))
    assert len(comm.buffers) == 3  # for the first chunk, and for each that was larger than all before
    return True


@pytest.mark.parametrize("size", [2, 4])
def test_every_piece_arrives_through_shared_memory(tmp_path, size):
    assert launch(size, in_shared_file, str(tmp_path)) == [True] * size


def on_gpu() -> bool:
    """Eager exchanges, then recorded ones, replayed in orders in which they were not recorded, ranks out of step."""
    device = torch.device("cuda", torch.cuda.current_device())
    comm = overlapped_comm_of(device)
    assert isinstance(comm, PeerMemory)
    check_all(comm, device, lambda: torch.cuda._sleep(random.randrange(1, 300_000)))
    rank, size, shape = comm.rank, comm.size, (256, 1024)
    mine = torch.zeros(shape, device=device)
    parts = torch.zeros(size, *shape, device=device)

    def several() -> list[torch.Tensor]:  # five exchanges: the next graph begins with the slot that this one ended with
        first = gathered(comm, mine)
        both = overlapping(comm, mine * 3, parts * 2)
        return [first, scattered(comm, parts), *both, gathered(comm, mine * 2)]

    def one() -> list[torch.Tensor]:
        few = comm.sum(mine[:3])
        assert few is not None
        return [scattered(comm, parts * 3), few]

    graphs = [recorded(work) for work in (several, one)]
    order, delays = random.Random(0), random.Random(rank)
    for turn in range(60):
        everyone = [chunk_of(r, shape, torch.float32, device, turn) for r in range(size)]
        shares = [chunk_of(r, (size * shape[0], shape[1]), torch.float32, device, 99 + turn) for r in range(size)]
        shares = [share.view(size, *shape) for share in shares]
        mine.copy_(everyone[rank])
        parts.copy_(shares[rank])
        expected, total = torch.cat(everyone), sum(share[rank] for share in shares)
        which = order.randrange(3)
        torch.cuda._sleep(delays.randrange(1, 3_000_000))  # up to 2 ms
        if which == 2:
            results = several()
        else:
            graph, results = graphs[which]
            graph.replay()
        if which == 1:
            assert torch.equal(results[0], 3 * total), turn
            assert torch.equal(results[1], sum(chunk[:3] for chunk in everyone)), turn
        else:
            (whole, used), sums, triple, twice, (double, _) = results
            assert torch.equal(whole, expected) and torch.equal(used, expected), turn
            assert torch.equal(sums, total) and torch.equal(double, 2 * expected), turn
            assert torch.equal(triple, 3 * expected) and torch.equal(twice, 2 * total), turn
    graphs.clear()
    return True


def behind_work() -> bool:
    """New memory while one rank's GPU has a second of work before it, and the others none."""
    device = torch.device("cuda", torch.cuda.current_device())
    comm = overlapped_comm_of(device)
    assert isinstance(comm, PeerMemory)
    for salt, rows in enumerate([100, 1_000, 10_000]):  # each needs a larger buffer
        chunks = [chunk_of(r, (rows, 8), torch.float32, device, salt) for r in range(comm.size)]
        few = chunks[comm.rank][:4].clone()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # `make_buffer` has nothing to free, which could wait for the GPU
        if comm.rank == 0:
            torch.cuda._sleep(2_000_000_000)
        whole, _ = gathered(comm, chunks[comm.rank])
        assert torch.equal(whole, torch.cat(chunks))
        if comm.rank == 0:
            torch.cuda._sleep(2_000_000_000)
        total = comm.sum(few)
        assert total is not None and torch.equal(total, sum(chunk[:4] for chunk in chunks))
    return True


@pytest.mark.gpu
def test_signals_of_new_memory_are_not_lost_behind_queued_work():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    assert launch(2, behind_work, on_gpu=True, timeout=100) == [True] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4])
def test_every_piece_arrives_through_the_gpus_memory(size):
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    assert launch(size, on_gpu, on_gpu=True, timeout=120) == [True] * size
