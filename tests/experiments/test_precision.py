"""The experiment that compares precisions: its arithmetic, and that it trains through the pretraining program."""

import json

import pytest

from experiments import precision

TINY = [
    "model.pattern=M S", "model.d_model=32", "model.d_ff=32", "model.mamba.headdim=16", "model.mamba.d_state=16",
    "model.mamba.chunk_size=32", "model.attention.n_heads=2", "data.seq_len=64", "train.steps=4",
    "train.global_batch=4", "train.micro_batch=4", "train.eval_samples=4", "optim.warmup_steps=1",
]  # fmt: skip


def result(losses):
    return {"ce": losses, "valid": 2.0, "skipped": 0, "loss_scale": None, "seconds": 1.0}


def test_losses_are_compared_by_windows():
    rows = precision.compare_losses(
        {"fp32": result([4.0, 4.0, 2.0, 2.0]), "bf16": result([4.2, 4.0, 2.0, None]), "fp16": {"failed": "no GPU"}}, 2
    )
    assert rows["bf16"]["largest"] == pytest.approx(0.025) and rows["bf16"]["at_end"] == 0
    assert rows["fp32"]["largest"] == 0 and rows["fp16"] == {"failed": "no GPU"}
    text = precision.comparison_table(rows, 2)
    assert "| bf16 | 4 | 2.0000 | 2.0000 | 4 |" in text and "+2.500 %" in text and "not run: no GPU" in text


def test_a_run_that_was_cut_off_is_compared_over_the_windows_it_finished():
    cut = {**result([4.0, 4.0, 3.0]), "valid": None}
    rows = precision.compare_losses({"fp32": cut, "bf16": result([4.0, 4.2, 9.0, 9.0])}, 2)
    assert rows["bf16"]["compared"] == 2 and rows["bf16"]["largest"] == pytest.approx(0.025)
    assert "valid_apart" not in rows["bf16"] and "| fp32 | 3 | 3.0000 | – | 2 |" in precision.comparison_table(rows, 2)


def test_it_trains_through_the_pretraining_program_and_reports_what_did_not_run(tmp_path):
    arguments = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--vocab-size", "512"]
    earlier = tmp_path / "earlier.json"
    earlier.write_text(json.dumps({"runs": {"fp32": result([6.2, 6.2, 6.2, 6.2])}}))
    arguments += ["--against", str(earlier), "--seconds", "120"]
    assert precision.main([*arguments, "--only", "bf16", "fp16", "--jobs", "1", "--window", "2", *TINY]) == 0
    kept = json.loads((tmp_path / "out.json").read_text())
    assert len(kept["runs"]["bf16"]["ce"]) == 4 and kept["runs"]["bf16"]["ce"][0] > 6
    assert "needs a GPU" in kept["rows"]["fp16"]["failed"] and kept["rows"]["bf16"]["compared"] == 4
