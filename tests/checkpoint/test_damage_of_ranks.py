"""What one rank finds damaged is damaged for all: they would otherwise load different checkpoints."""

import pytest

from megatron_taipan.checkpoint import verification
from megatron_taipan.checkpoint.folder import MANIFEST
from megatron_taipan.checkpoint.verification import damage
from tests.checkpoint.folders import make, rehash

RANKS = 3


class Gathered(Exception):
    """What a rank would send."""


def on_all_ranks(monkeypatch, call) -> list:
    """What `call` gives on each rank, one after the other, where it gathers from all once."""

    def send(share):
        raise Gathered(share)

    monkeypatch.setattr(verification, "world_size", lambda: RANKS)
    shares = []
    for rank in range(RANKS):
        monkeypatch.setattr(verification, "this_rank", lambda rank=rank: rank)
        monkeypatch.setattr(verification, "gather_objects", send)
        with pytest.raises(Gathered) as caught:
            call(rank)
        shares.append(caught.value.args[0])
    results = []
    for rank in range(RANKS):
        monkeypatch.setattr(verification, "this_rank", lambda rank=rank: rank)
        monkeypatch.setattr(verification, "gather_objects", lambda share: shares)
        results.append(call(rank))
    return results


@pytest.fixture
def checkpoint(tmp_path):
    """Of six files."""
    path = make(tmp_path, 4)
    names = [f"state/rank_{number:05d}.safetensors" for number in range(4)]
    for number, name in enumerate(names):
        (path / name).write_bytes(bytes([number] * 100))
    rehash(path, *names)
    return path


@pytest.mark.parametrize("number", range(4))
def test_a_file_that_one_rank_finds_changed(checkpoint, monkeypatch, number):
    assert on_all_ranks(monkeypatch, lambda rank: damage(checkpoint)) == [None] * RANKS
    file = checkpoint / f"state/rank_{number:05d}.safetensors"
    file.write_bytes(bytes([99] * 100))
    said = f"state/{file.name} changed since it was written"
    assert on_all_ranks(monkeypatch, lambda rank: damage(checkpoint)) == [said] * RANKS


@pytest.mark.parametrize("late", range(RANKS))
def test_a_file_that_one_rank_does_not_see(checkpoint, monkeypatch, late):
    """Its view of a shared folder lags behind."""
    incomplete = verification.incomplete

    def seen(rank):
        said = "state/x is missing" if rank == late else None
        monkeypatch.setattr(verification, "incomplete", lambda path: said or incomplete(path))
        return damage(checkpoint)

    assert on_all_ranks(monkeypatch, seen) == ["state/x is missing"] * RANKS
    (checkpoint / MANIFEST).unlink()
    assert on_all_ranks(monkeypatch, lambda rank: damage(checkpoint))[0] is not None
