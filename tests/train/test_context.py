"""Runs whose rows are shared out over ranks: as one process, and stopped and resumed with other numbers of pieces."""

import numpy as np
import pytest

from checkpoints import reshard
from megatron_taipan.data.indexed import IndexedWriter
from tests.distributed.series import Job, launch_series
from tests.train.runs import log, runs
from tests.train.toy import VOCAB, toy_tree, write_data

GATE = {"capacity": {"start": 0.6, "end": 0.2}, "gradient": "all", "budget": "batch", "refinement": "add"}


@pytest.mark.slow
def test_pieces_of_rows_train_as_whole_rows_and_resume_in_other_numbers(tmp_path):
    prefix = write_data(tmp_path / "data")

    def tree(name: str, stop: int, contexts: tuple[int, int] = (1, 1), **parallel: int) -> dict:
        made = toy_tree(
            prefix, tmp_path / name, parallel=parallel, data={"valid_fraction": 0.1}, model={"gate": GATE},
            train={"stop_at": stop, "eval_every": 3, "steps": 6, "global_batch": 4, "micro_batch": 1},
        )  # fmt: skip
        before, after = ({"context": n} for n in contexts)
        stages = [{"steps": 3, "parallel": before}, {"steps": 3, "parallel": after, "data": {"seq_len": 64}}]
        return made | {"stages": stages}

    launch_series(
        [
            Job(1, runs, [tree("whole", 6)]),
            Job(2, runs, [tree("pieces", 2, (2, 2))]),
            Job(4, runs, [tree("pieces", 5, (2, 4), zero_stage=3)]),  # of two data ranks, then of one
        ]
    )
    newest = str(max((tmp_path / "pieces").glob("step_*")))
    assert reshard.main([newest, str(tmp_path / "moved"), "--processes", "4", "--context", "2", "--tensor", "2"]) == 0
    launch_series([Job(4, runs, [tree("moved", 6, (2, 2), tensor=2)])])

    shares = "layers.1.selected", "layers.1.selected_eval", "layers.1.alpha", "layers.1.budget"
    for event, names in {"step": ("loss", "grad_norm", "tokens", *shares), "valid": ("ce", "tokens", *shares)}.items():
        whole = {record["step"]: record for record in log(tmp_path / "whole", event)}
        pieces = {record["step"]: record for name in ("pieces", "moved") for record in log(tmp_path / name, event)}
        assert whole.keys() <= pieces.keys()  # those stopped in between are validated there as well
        for step, record in whole.items():
            ours = [pieces[step][name] for name in names]
            assert ours == pytest.approx([record[name] for name in names], rel=2e-5), (event, step)
            if event == "valid":
                assert pieces[step]["positions"] == pytest.approx(record["positions"], rel=2e-5), step


@pytest.mark.timeout(1800)
@pytest.mark.manual  # 2026-11-29: 127 s
def test_one_long_document_in_a_step(tmp_path):
    """Over four processes as over one, each of which reads its quarter."""
    length = 1 << 20
    with IndexedWriter(tmp_path / "data", np.uint16) as writer:
        writer.add_document((np.arange(length + 100) * 7919 % 65537 % VOCAB).astype(np.uint16))

    def tree(name: str, **parallel: int) -> dict:
        return toy_tree(
            str(tmp_path / "data"), tmp_path / name, parallel=parallel | {"recompute": "full"},
            model={
                "pattern": "M S M", "vocab_size": VOCAB, "d_model": 16, "d_ff": 16,
                # few queries: the reference of attention, which CPUs run, is slow where keys are many
                "gate": {"capacity": 0.02, "init_bias": -4.0},
                "mamba": {"d_state": 8, "headdim": 16, "chunk_size": 64},
                "attention": {"n_heads": 2, "n_kv_heads": 1, "window": 16},
            },
            data={"seq_len": length, "one_document": True, "valid_fraction": 0.0},
            train={"steps": 1, "global_batch": 1, "micro_batch": 1}, optim={"warmup_steps": 0},
        )  # fmt: skip

    launch_series([Job(1, runs, [tree("whole")]), Job(4, runs, [tree("pieces", context=4)])], timeout=850)
    whole, pieces = (
        [[record[name] for name in ("loss", "grad_norm", "layers.1.selected")] for record in log(tmp_path / run)]
        for run in ("whole", "pieces")
    )
    assert len(whole) == 1 and pieces[0] == pytest.approx(whole[0], rel=1e-5)
