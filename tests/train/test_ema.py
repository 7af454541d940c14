"""The moving average of the weights: numpy's over the masters of every step, in each layout, through a resume."""

from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints import export_hf, reshard
from megatron_taipan.checkpoint.weights import open_checkpoint, open_weights
from megatron_taipan.data.loader import build_dataset
from megatron_taipan.errors import UserError
from megatron_taipan.evaluation import perplexity
from megatron_taipan.inference.loading import load_model
from tests.distributed.series import Job, launch_series
from tests.train.runs import runs, with_options
from tests.train.toy import VOCAB, toy_tree, write_data

DECAY, STEPS = 0.5, 5  # (1 + n) / (10 + n) is below it until step 8: the warm-up counts; one run has another decay
LAYOUTS = {
    "one": (1, {"zero_stage": 1}),
    "stage0": (2, {"zero_stage": 0}),
    "stage3": (2, {"zero_stage": 3}),
    "tensor": (2, {"tensor": 2}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run in each layout, with a checkpoint of every step; `resumed` stops after step 3 and goes on."""
    folder = tmp_path_factory.mktemp("ema")
    prefix = write_data(folder / "data")

    def tree(name: str, layout: dict, **train) -> dict:
        made = toy_tree(prefix, folder / name, train={"steps": STEPS} | train, parallel=layout)
        made["checkpoint"]["save_every"] = 1
        made["optim"]["ema_decay"] = DECAY
        return made

    one = tree("resumed", {"zero_stage": 1})
    late = with_options(one, checkpoint={"dir": str(folder / "late")})
    before = with_options(late, optim={"ema_decay": None}, train={"stop_at": 3})
    quick = with_options(one, checkpoint={"dir": str(folder / "quick")}, optim={"ema_decay": 0.2})
    jobs = [Job(2, runs, [tree(name, layout)]) for name, (size, layout) in LAYOUTS.items() if size == 2]
    first = [with_options(one, train={"stop_at": 3}), one, before, late, quick]
    jobs.append(Job(1, runs, [tree("one", {"zero_stage": 1}), *first]))
    for results in launch_series(jobs):
        assert set(results[0]) == {0}
    return folder


def masters(run: Path) -> list[dict[str, np.ndarray]]:
    """The weights after steps 1 to STEPS."""
    opened = [open_checkpoint(run / f"step_{step:08d}") for step in range(1, STEPS + 1)]
    return [{name: one.load(name).double().numpy() for name in one.names()} for one in opened]


def averages(run: Path, step: int) -> dict[str, np.ndarray]:
    opened = open_checkpoint(run / f"step_{step:08d}", ema=True)
    return {name: opened.load(name).double().numpy() for name in opened.names() if "threshold" not in name}


@pytest.mark.parametrize(("run", "decay"), [*((name, DECAY) for name in LAYOUTS), ("quick", 0.2)])
def test_each_step_moves_it_as_numpy_does(place, run, decay):
    found = [averages(place / run, step) for step in range(1, STEPS + 1)]
    weights = masters(place / run)
    for name in found[0]:
        for n in range(2, STEPS + 1):
            b = min(decay, (1 + n) / (10 + n))
            expected = b * found[n - 2][name] + (1 - b) * weights[n - 1][name]
            np.testing.assert_allclose(found[n - 1][name], expected, rtol=1e-5, atol=1e-7, err_msg=f"{name} {n}")
    moved = [np.abs(found[-1][name] - weights[-1][name]).max() for name in found[0]]
    assert max(moved) > 1e-4  # an average that is the weights themselves would be none


def test_layouts_agree_and_a_resume_is_bit_equal(place):
    one = averages(place / "one", STEPS)
    for run in LAYOUTS:
        for name, value in averages(place / run, STEPS).items():
            np.testing.assert_allclose(value, one[name], rtol=1e-3, atol=2e-4, err_msg=f"{run} {name}")
    resumed = averages(place / "resumed", STEPS)
    assert all(np.array_equal(resumed[name], one[name]) for name in one)


def test_begun_in_a_later_start_it_begins_as_the_weights(place):
    with pytest.raises(UserError, match="holds no average"):
        open_checkpoint(place / "late/step_00000003", ema=True)
    name, n = "final_norm.weight", 4
    weights, b = masters(place / "late"), min(DECAY, (1 + n) / (10 + n))
    expected = b * weights[2][name] + (1 - b) * weights[3][name]
    np.testing.assert_allclose(averages(place / "late", n)[name], expected, rtol=1e-6, atol=1e-8)


def test_programs_take_it(place, capsys):
    run = str(place / "one")
    for flag in ([], ["--ema"]):
        assert perplexity.main([run, "--samples", "4", "--split", "train", *flag]) == 0
    plain, averaged = (line for line in capsys.readouterr().out.splitlines() if line.startswith(run))
    model, _, config = load_model(Path(run), ema=True)
    assert torch.equal(model.final_norm.weight, open_checkpoint(run, ema=True).load("final_norm.weight"))
    expected = perplexity.score(model, build_dataset(config.data, "train", VOCAB), samples=4).ce
    assert f"{run} (EMA)" in averaged and f"{expected:.4f}" in averaged and plain.split()[1:] != averaged.split()[2:]


def test_a_reshard_and_an_export_take_it_along(place, tmp_path):
    source = place / "tensor" / f"step_{STEPS:08d}"
    assert reshard.main([str(source), str(tmp_path / "laid"), "--tensor", "1", "--processes", "3"]) == 0
    before, after = averages(place / "tensor", STEPS), averages(tmp_path / "laid", STEPS)
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert export_hf.main([str(source), str(tmp_path / "hf"), "--ema", "--no-tokenizer"]) == 0
    exported = open_weights(tmp_path / "hf")
    assert all(np.array_equal(exported.load(name).double().numpy(), before[name]) for name in before)
    with pytest.raises(UserError, match="exported folder"):
        open_weights(tmp_path / "hf", ema=True)
