"""The mean of checkpoints: numpy's, whatever their layouts, in a folder that evaluation and export read."""

import json

import numpy as np
import pytest

from checkpoints import average, reshard
from megatron_taipan.checkpoint.folder import METADATA
from megatron_taipan.checkpoint.weights import open_checkpoint
from megatron_taipan.inference.loading import load_model
from tests.checkpoints.made import memory_state, write_checkpoint


def made(folder, seed: int = 1, **changes):
    """A checkpoint with weights of their own."""
    state = memory_state("M S W", seed=seed, **changes)
    return write_checkpoint(folder, state.config, state.load)


def test_equals_numpys_average_over_layouts(tmp_path, capsys):
    sources = [made(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 2), ("c", 3))]
    assert reshard.main([str(sources[1]), str(tmp_path / "split"), "--tensor", "2", "--processes", "4"]) == 0
    told = [str(sources[0]), str(tmp_path / "split"), str(sources[2])]
    assert average.main([*told, str(tmp_path / "out"), "--weights", "1", "2", "5"]) == 0
    assert "0.6250 of" in capsys.readouterr().out
    mean, parts = open_checkpoint(tmp_path / "out"), [open_checkpoint(path) for path in sources]
    assert mean.names() == parts[0].names() and not mean.moments
    for name in mean.names():
        expected = np.average([part.load(name).double().numpy() for part in parts], axis=0, weights=[1, 2, 5])
        np.testing.assert_allclose(mean.load(name).numpy(), expected, rtol=2e-7, atol=1e-8)
    model, _, config = load_model(tmp_path / "out")  # as evaluation does
    assert model.num_params() and config is not None
    said = json.loads((mean.path / METADATA).read_text())
    assert [part["share"] for part in said["average_of"]] == [0.125, 0.25, 0.625]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "at least two checkpoints"),
        (["b", "--weights", "1"], "--weights has 1 numbers for 2 checkpoints"),
        (["b", "--weights", "1", "0"], "0 is not a number above 0"),
        (["b", "--weights", "1", "nan"], "nan is not a number above 0"),
        (["b", "step_00000003"], "has the name of a run's own checkpoint"),
        (["b", "weights_00000003"], "has the name of a run's own checkpoint"),
        (["other"], "different networks (model.d_ff=48 and 32)"),
    ],
)
def test_refusals_leave_nothing(tmp_path, capsys, more, message):
    for name, changes in (("a", {}), ("b", {}), ("other", {"d_ff": 48})):
        made(tmp_path / name, **changes)
    names = [str(tmp_path / word) if word in ("b", "other") else word for word in more]
    last = 1 if more and more[0] in ("b", "other") else 0
    out = tmp_path / (names.pop() if names and names[-1].endswith("_00000003") else "out")
    assert average.main([str(tmp_path / "a"), *names[:last], str(out), *names[last:]]) == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b", "other"}


def test_a_second_mean_does_not_replace_the_first(tmp_path, capsys):
    told = [str(made(tmp_path / name, seed)) for name, seed in (("a", 1), ("b", 2))]
    assert average.main([*told, str(tmp_path / "out")]) == 0
    assert average.main([*told, str(tmp_path / "out")]) == 2
    assert "exists; choose another folder" in capsys.readouterr().err


@pytest.mark.parametrize("weight", [1e308, 1.0, 1e-300])
def test_shares_do_not_overflow(weight):
    assert average.shares_of([0.75 * weight, 0.25 * weight], 2) == pytest.approx([0.75, 0.25])
    assert average.shares_of([weight] * 4, 4) == [0.25] * 4
