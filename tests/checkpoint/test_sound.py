"""Where a run whose loss was not finite can go on: every kind of state in every element is looked at."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from megatron_taipan.checkpoint import verification
from megatron_taipan.checkpoint.folder import folder_name
from megatron_taipan.checkpoint.verification import damage, newest_sound, where_to_go_on
from tests.checkpoint.folders import rehash
from tests.checkpoints.made import memory_state, write_checkpoint

FILE = "state/rank_00000.safetensors"


@pytest.fixture
def run(tmp_path):
    """Sound checkpoints of the steps 7 and 8."""
    state = memory_state("M S")
    first = write_checkpoint(tmp_path, state.config, state.load)
    first.rename(tmp_path / folder_name(8))
    write_checkpoint(tmp_path, state.config, state.load)
    assert newest_sound(tmp_path).path.name == "step_00000008"
    return tmp_path


@pytest.mark.parametrize("kind", ["master", "exp_avg", "exp_avg_sq", "ema"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite(run, monkeypatch, kind, value):
    monkeypatch.setattr(verification, "READ_ELEMENTS", 10)  # looked at in pieces, of which this is the last
    path, name = run / "step_00000008", "layers.1.attention.q_proj"
    tensors = load_file(path / FILE)
    tensors[f"{name}|{kind}"] = tensors[f"{name}|master"].copy()
    tensors[f"{name}|{kind}"][-1] = value
    save_file(tensors, path / FILE)
    rehash(path)
    assert damage(path) is None
    found = newest_sound(run)
    assert found.path.name == "step_00000007"
    assert found.passed_over == [f"step_00000008: {name} ({kind}) in {FILE} is not finite"]
    said = where_to_go_on(run, 7)
    assert said.startswith("nothing was updated since") and "step_00000008" in said and "delete it" in said
