"""Runs whose rows are shared out over ranks: as one process, and stopped and resumed with other numbers of pieces."""

import pytest

from checkpoints import reshard
from tests.distributed.series import Job, launch_series
from tests.train.runs import log, runs
from tests.train.toy import toy_tree, write_data

GATE = {"capacity": {"start": 0.6, "end": 0.2}, "gradient": "all", "budget": "batch", "refinement": "add"}


@pytest.mark.slow
def test_pieces_of_rows_train_as_whole_rows_and_resume_in_other_numbers(tmp_path):
    prefix = write_data(tmp_path / "data")

    def tree(name: str, stop: int, **parallel: int) -> dict:
        return toy_tree(
            prefix, tmp_path / name, parallel=parallel, data={"valid_fraction": 0.1}, model={"gate": GATE},
            train={"stop_at": stop, "eval_every": 3, "steps": 6, "global_batch": 4, "micro_batch": 1},
        )  # fmt: skip

    launch_series(
        [
            Job(1, runs, [tree("whole", 6)]),
            Job(2, runs, [tree("pieces", 2, context=2)]),
            Job(4, runs, [tree("pieces", 4, context=2, zero_stage=3)]),  # of two data ranks
        ]
    )
    newest = str(max((tmp_path / "pieces").glob("step_*")))
    assert reshard.main([newest, str(tmp_path / "moved"), "--processes", "4", "--context", "2", "--tensor", "2"]) == 0
    launch_series([Job(4, runs, [tree("moved", 6, context=2, tensor=2)])])

    shares = "layers.1.selected", "layers.1.selected_eval", "layers.1.alpha", "layers.1.budget"
    for event, names in {"step": ("loss", "grad_norm", "tokens", *shares), "valid": ("ce", "tokens", *shares)}.items():
        whole = {record["step"]: record for record in log(tmp_path / "whole", event)}
        pieces = {record["step"]: record for name in ("pieces", "moved") for record in log(tmp_path / name, event)}
        assert whole.keys() <= pieces.keys()  # those stopped in between are validated there as well
        for step, record in whole.items():
            assert [pieces[step][n] for n in names] == pytest.approx([record[n] for n in names], rel=2e-5), (event, step)
