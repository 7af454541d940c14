"""Which checkpoint is gone on from: no changed byte is loaded, and all ranks choose the same."""

from pathlib import Path

import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_taipan.checkpoint.folder import MANIFEST, METADATA, checkpoints, incomplete
from megatron_taipan.checkpoint.verification import damage, newest_verified, rewind_target, wrong_hashes
from megatron_taipan.data.share import share
from tests.checkpoint.folders import make
from tests.distributed.launch import launch


def test_changed_content_of_the_same_size_is_found_by_its_hash(tmp_path):
    path = make(tmp_path, 1)
    (path / "state" / "w.pt").write_text("weighty 1"[: len("weights 1")])
    assert incomplete(path) is None
    assert wrong_hashes(path, ["state/w.pt", METADATA]) == ["state/w.pt"]
    assert damage(path) == "state/w.pt changed since it was written"


def test_resume_passes_over_what_its_hash_condemns(tmp_path):
    good, changed, cut = make(tmp_path, 1), make(tmp_path, 2), make(tmp_path, 3)
    (changed / "state" / "w.pt").write_text("weighty 2"[: len("weights 2")])
    (cut / MANIFEST).unlink()
    found = newest_verified(tmp_path)
    assert found.path == good
    assert [text.split(":")[0] for text in found.passed_over] == ["step_00000003", "step_00000002"]
    assert "never completed" in found.passed_over[0] and "changed since" in found.passed_over[1]
    (good / "state" / "w.pt").write_text("x")
    assert newest_verified(tmp_path) is None and newest_verified(tmp_path / "nowhere") is None


def choices(directory: Path) -> tuple:
    """What a run resumes from and goes back to, where rank 1 does not see the newest checkpoint yet."""
    from megatron_taipan.checkpoint import verification

    if dist.get_rank() == 1:
        verification.checkpoints = lambda directory: checkpoints(directory)[:-1]
    return newest_verified(directory).path.name, rewind_target(directory, 4).name, rewind_target(directory, 5).name


def test_ranks_choose_the_same_checkpoint_though_one_sees_an_older_folder(tmp_path):
    for step in (4, 6, 8):
        make(tmp_path, step)
    assert launch(2, choices, tmp_path) == [("step_00000008", "step_00000008", "step_00000008")] * 2


@given(st.lists(st.integers(0, 1000), max_size=20), st.integers(1, 6))
def test_verification_is_dealt_out_evenly(sizes, ranks):
    files = [(size, str(number)) for number, size in enumerate(sizes)]
    parts = [share(files, ranks, rank) for rank in range(ranks)]
    assert sorted(name for part in parts for name in part) == sorted(name for _, name in files)
    loads = [sum(sizes[int(name)] for name in part) for part in parts]
    assert max(loads) - min(loads) <= max(sizes, default=0)
