"""Optimizer state and parameters in the host's memory: the same run as without, and stopped and resumed.

On a CPU nothing moves, but DeepSpeed's code for it runs, with torch's AdamW as on a GPU. Pinned memory and copies
that overlap are not tried here.
"""

from pathlib import Path

import pytest
import torch

from megatron_taipan.checkpoint.folder import find_newest
from tests.checkpoint.test_loading import everything
from tests.distributed.series import Job, launch_series
from tests.train.runs import log, numbers, runs, with_options
from tests.train.toy import toy_tree, write_data

pytestmark = pytest.mark.manual

OFFLOAD = {
    **{f"stage {stage}": {"zero_stage": stage, "offload_optimizer": "cpu"} for stage in (1, 2, 3)},
    "parameters": {"zero_stage": 3, "offload_param": "cpu"},
    "both": {"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"},
}
STEPS, CUT = 6, 3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_runs_are_those_without_offload_and_resume_bit_for_bit(tmp_path, precision):
    train = {"steps": STEPS, "global_batch": 4, "micro_batch": 1, "eval_samples": 2, "precision": precision}
    tree = toy_tree(write_data(tmp_path / "data"), "", train=train)

    def run(folder: str, parallel: dict, **changes: int) -> dict:
        checkpoint = {"dir": str(tmp_path / folder)}
        return with_options(tree, parallel=parallel, checkpoint=checkpoint, train=train | changes)

    plain = {f"plain {stage}": {"zero_stage": stage} for stage in (1, 2, 3)}
    whole = [run(name, parallel) for name, parallel in (plain | OFFLOAD).items()]
    parts = [run(f"parts {name}", parallel, stop_at=CUT) for name, parallel in OFFLOAD.items()]
    rest = [run(f"parts {name}", parallel) for name, parallel in OFFLOAD.items()]
    # begun without offload, continued with it, and the other way round
    begun = [run("to", plain["plain 3"], stop_at=CUT), run("from", OFFLOAD["both"], stop_at=CUT)]
    changed = [run("to", OFFLOAD["both"]), run("from", plain["plain 3"])]
    done = launch_series([Job(2, runs, whole), Job(2, runs, parts + begun), Job(2, runs, rest + changed)], timeout=300)
    assert all(status == 0 for results in done for status in results[0]), done

    for name, parallel in OFFLOAD.items():
        assert_close(tmp_path / name, tmp_path / f"plain {parallel['zero_stage']}", precision)
        assert [record["step"] for record in log(tmp_path / f"parts {name}", "start")] == [0, CUT]
        assert numbers(tmp_path / f"parts {name}") == numbers(tmp_path / name)
        ours, theirs = (everything(find_newest(tmp_path / path).path) for path in (f"parts {name}", name))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    for name in ("to", "from"):
        assert_close(tmp_path / name, tmp_path / "plain 3", precision)


def assert_close(run: Path, other: Path, precision: str) -> None:
    """Losses and norms of every step; in bf16 a rounded sum turns Adam's first steps here and there."""
    limit = 1e-6 if precision == "fp32" else 3e-3
    for one, two in zip(log(run), log(other), strict=True):
        for what in ("ce", "grad_norm"):
            assert one[what] == pytest.approx(two[what], rel=limit), (run.name, one["step"], what)
