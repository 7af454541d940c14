"""Loss spikes: what counts as one, and that going back is exact."""

import dataclasses
import json
import signal
import statistics
from types import SimpleNamespace

import pytest

from megatron_taipan.checkpoint import folder
from megatron_taipan.checkpoint.metadata import Progress, read_metadata
from megatron_taipan.errors import EXIT_REQUEUE, UserError
from megatron_taipan.train import loop
from megatron_taipan.train.spikes import after_rewind, remember, z_score
from megatron_taipan.train.step import StepResult
from megatron_taipan.train_config import TrainConfig
from tests.checkpoint.folders import rehash
from tests.distributed.launch import launch
from tests.train.runs import log, numbers, runs, with_options
from tests.train.toy import toy_tree, write_data

WATCH = TrainConfig(steps=9, global_batch=1, spike_z=4.0, spike_window=5, spike_rewind=True, spike_max_rewinds=2)


def step(ce: float, skipped: bool = False) -> StepResult:
    return StepResult(ce, ce, 0.0, [], 1.0, skipped)


def test_spike_is_a_loss_that_many_deviations_above_the_window():
    window = [3.0, 3.2, 2.9, 3.1, 3.0]
    deviation, mean = statistics.pstdev(window), statistics.fmean(window)
    above, below = mean + 4.01 * deviation, mean + 3.99 * deviation
    assert z_score(window, step(above), WATCH) == pytest.approx(4.01)
    assert z_score(window, step(below), WATCH) is None
    assert z_score(window, step(mean - 9 * deviation), WATCH) is None  # below is no spike
    assert z_score(window[1:], step(above), WATCH) is None  # the window is not full
    assert z_score(window, step(above, skipped=True), WATCH) is None
    assert z_score(window, step(above), WATCH.model_copy(update={"spike_z": None})) is None
    assert z_score([3.0] * 5, step(3.0), WATCH) is None


@pytest.mark.parametrize("newest, goes_back", [(4, False), (5, True)])
def test_a_checkpoint_of_the_stage_before_is_not_gone_back_to(tmp_path, monkeypatch, newest, goes_back):
    """Step 5 is the first of the second stage; what is loaded is not the point."""
    notes: list[str] = []
    run = SimpleNamespace(
        config=SimpleNamespace(train=WATCH, checkpoint=SimpleNamespace(save_every=1)), directory=tmp_path,
        progress=SimpleNamespace(step=7), stage=SimpleNamespace(first=4), saver=SimpleNamespace(finish=lambda: None),
        metrics=SimpleNamespace(note=lambda kind, text, **_: notes.append(text)),
        engine=None, identity=None, groups=None,
    )  # fmt: skip
    loaded: list[str] = []

    def load(engine, path, **_):
        loaded.append(path.name)
        raise InterruptedError

    monkeypatch.setattr(loop, "rewind_target", lambda *_: tmp_path / f"step_{newest:08d}")
    monkeypatch.setattr(loop, "load_training_state", load)
    if goes_back:
        with pytest.raises(InterruptedError):
            loop.take_back(run, ce=9.0, z=7.0)
        assert loaded == ["step_00000005"]
    else:
        assert not loop.take_back(run, ce=9.0, z=7.0) and not loaded
        assert notes[-1].endswith("is of the stage before, so nothing is taken back")


def test_window_keeps_the_last_losses_of_steps_that_counted():
    window: list[float] = []
    for number in range(8):
        window = remember(window, step(float(number), skipped=number == 6), WATCH)
    assert window == [2.0, 3.0, 4.0, 5.0, 7.0]
    assert remember([], step(1.0), WATCH.model_copy(update={"spike_z": None})) == []


def test_rewinding_keeps_the_old_weights_count_and_the_new_place_in_the_data():
    saved, now = Progress(step=10, samples=40, tokens=400, recent=[1.0]), Progress(step=17, samples=68, tokens=680)
    once = after_rewind(saved, now, z=5.0, train=WATCH)
    assert (once.step, once.samples, once.tokens, once.recent) == (10, 68, 400, [1.0])
    # of a checkpoint that does not know how long the run was to be: what schedules' fractions are of stays
    assert after_rewind(saved, dataclasses.replace(now, run_steps=90), z=5.0, train=WATCH).run_steps == 90
    (record,) = once.rewinds
    assert (record["from_step"], record["to_step"]) == (17, 10)
    assert (record["first_sample"], record["past_sample"]) == (40, 68)
    twice = after_rewind(saved, dataclasses.replace(now, rewinds=once.rewinds), z=5.0, train=WATCH)
    with pytest.raises(UserError, match="after 2 rewinds"):
        after_rewind(saved, dataclasses.replace(now, rewinds=twice.rewinds), z=5.0, train=WATCH)


def bad_samples(trees: list[dict], bad: list[int], stop: bool = False) -> list:
    """Runs like `runs`; a step that holds one of the samples reports a loss of 50 on every rank.

    Args:
        stop: whether a signal comes during such a step.
    """
    import torch
    import torch.distributed as dist

    from megatron_taipan.train import loop

    train_step = loop.train_step

    def with_bad_data(engine, batches, **kwargs):
        result = train_step(engine, batches, **kwargs)
        ours = any(int(sample) in bad for batch in batches for sample in batch["sample"])
        hit = torch.tensor([float(ours)])
        dist.all_reduce(hit)
        if stop and hit.item():
            signal.raise_signal(signal.SIGTERM)
        return dataclasses.replace(result, ce=50.0) if hit.item() else result

    loop.train_step = with_bad_data
    try:
        return runs(trees)
    finally:
        loop.train_step = train_step


TRAIN = {
    "steps": 12, "global_batch": 4, "micro_batch": 2, "precision": "fp32", "eval_every": 0, "eval_samples": 2,
    "spike_z": 8.0, "spike_window": 4, "spike_rewind": True,
}  # fmt: skip


def test_run_rewinds_past_bad_data_and_resumes_exactly(tmp_path):
    """Global batches of 4: samples 28 to 31 are step 8. Saves at 3 and 6, so steps 7 and on are taken again."""
    prefix = write_data(tmp_path / "data")

    def tree(name: str, **options) -> dict:
        base = toy_tree(prefix, tmp_path / name, train=TRAIN | options, checkpoint={"save_every": 3})
        return with_options(base, checkpoint={"dir": str(tmp_path / name)})

    stages = [tree(f"stage{stage}") | {"parallel": {"zero_stage": stage, "timeout_s": 60}} for stage in (2, 3)]
    everything = [tree("whole"), tree("parts", stop_at=7), tree("parts"), tree("warned", spike_rewind=False), *stages]
    for results in launch(2, bad_samples, everything, [30]):
        assert results == [0] * len(everything)
    whole = log(tmp_path / "whole")
    assert [r["step"] for r in whole] == [*range(1, 9), *range(7, 13)]
    (record,) = log(tmp_path / "whole", "rewind")
    assert (record["from_step"], record["to_step"], record["first_sample"], record["past_sample"]) == (8, 6, 24, 32)
    assert len(log(tmp_path / "whole", "spike")) == len(log(tmp_path / "warned", "spike")) == 1
    assert [r["step"] for r in log(tmp_path / "warned")] == list(range(1, 13))
    progress = read_metadata(tmp_path / "whole" / "step_00000012")["progress"]
    assert progress["samples"] == 32 + 6 * 4 and progress["tokens"] == 12 * 4 * 32 and len(progress["rewinds"]) == 1

    # stopped between save and spike, and resumed: the window came from the checkpoint, so it rewinds just the same
    assert numbers(tmp_path / "parts")[-6:] == numbers(tmp_path / "whole")[-6:]
    for stage in (2, 3):
        other = [r["ce"] for r in log(tmp_path / f"stage{stage}")]
        assert other == pytest.approx([r["ce"] for r in whole], rel=1e-5)

    # the same as a run that is started from the checkpoint of step 6 with the place in the data moved by hand
    (tmp_path / "moved").mkdir()
    moved = tmp_path / "moved" / "step_00000006"
    (tmp_path / "whole" / "step_00000006").rename(moved)
    metadata = json.loads((moved / folder.METADATA).read_text())
    metadata["progress"]["samples"] = 32
    (moved / folder.METADATA).write_text(json.dumps(metadata))
    rehash(moved)
    assert launch(2, runs, [tree("moved", spike_z=None, spike_rewind=False)])[0] == [0]
    assert numbers(tmp_path / "moved") == numbers(tmp_path / "whole")[-6:]


def test_run_stopped_after_it_went_back_does_not_resume_from_what_it_took_back(tmp_path):
    """Step 8 spikes. A stop leaves a checkpoint of step 7; the rewind goes to step 4, another stop comes at step 5."""
    prefix = write_data(tmp_path / "data")

    def tree(name: str, **options) -> dict:
        return toy_tree(prefix, tmp_path / name, train=TRAIN | options, checkpoint={"save_every": 4})

    assert launch(2, bad_samples, [tree("whole"), tree("parts", stop_at=7)], [30])[0] == [0, 0]
    assert launch(2, bad_samples, [tree("parts")], [30], True)[0] == [EXIT_REQUEUE]
    assert [folder.step_of(path) for path in folder.checkpoints(tmp_path / "parts")] == [4, 5]
    assert launch(2, bad_samples, [tree("parts")], [30])[0] == [0]
    assert len(log(tmp_path / "parts", "rewind")) == len(log(tmp_path / "whole", "rewind")) == 1
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
