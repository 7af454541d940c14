"""What a mean takes from its sources: exact numbers of all of them, configuration and counters of the last."""

import json
from pathlib import Path

import numpy as np
import pytest

from checkpoints import average
from megatron_taipan.checkpoint.folder import METADATA
from megatron_taipan.checkpoint.metadata import read_metadata
from megatron_taipan.checkpoint.verification import damage
from megatron_taipan.checkpoint.weights import open_checkpoint
from megatron_taipan.config_loading import make_config
from tests.checkpoint.folders import rehash
from tests.checkpoints.made import memory_state, write_checkpoint


def made(folder: Path, seed: int, pattern: str = "M S W", tokens: int = 0, warmup: int = 0) -> Path:
    """A checkpoint with weights of its own, so many tokens after the run's start."""
    state = memory_state(pattern, seed=seed)
    tree = state.config.model_dump(mode="json")
    tree["optim"]["warmup_steps"] = warmup
    path = write_checkpoint(folder, make_config(tree), state.load)
    metadata = json.loads((path / METADATA).read_text())
    metadata["progress"]["tokens"] = tokens
    (path / METADATA).write_text(json.dumps(metadata))
    rehash(path)
    assert damage(path) is None
    return path


def test_the_last_source_gives_configuration_and_counters(tmp_path):
    sources = [made(tmp_path / "a", 1, tokens=100, warmup=1), made(tmp_path / "b", 2, tokens=50, warmup=3)]
    assert average.main([*map(str, sources), str(tmp_path / "out")]) == 0
    mean = open_checkpoint(tmp_path / "out")
    assert (mean.tokens, mean.config.optim.warmup_steps, mean.moments) == (50, 3, ())
    assert read_metadata(tmp_path / "out")["average_of"] == [{"checkpoint": str(p), "share": 0.5} for p in sources]


def test_every_number_is_the_nearest_to_the_mean(tmp_path):
    """Of many sources sums in float32 would be rounded again and again."""
    sources = [made(tmp_path / str(seed), seed) for seed in range(1, 6)]
    assert average.main([*map(str, sources), str(tmp_path / "out")]) == 0
    mean, parts = open_checkpoint(tmp_path / "out"), [open_checkpoint(path) for path in sources]
    found = np.concatenate([mean.load(name).numpy().ravel() for name in mean.names()])
    all_parts = [np.concatenate([part.load(name).numpy().ravel() for name in mean.names()]) for part in parts]
    exact = np.mean(np.array(all_parts, np.float64), axis=0).astype(np.float32)
    assert np.mean(found == exact) > 0.98  # what lies between two numbers may be rounded to either


def test_one_network_in_two_spellings_is_one(tmp_path, capsys):
    sources = [made(tmp_path / "a", 1, "M S M S"), made(tmp_path / "b", 2, "(M S)*2")]
    assert average.main([*map(str, sources), str(tmp_path / "out")]) == 0
    other = made(tmp_path / "c", 3, "M S S M")
    assert average.main([str(sources[0]), str(other), str(tmp_path / "no")]) == 2
    assert "different networks (model.pattern='M S S M' and 'M S M S')" in capsys.readouterr().err


@pytest.mark.parametrize("which", [0, 1])
def test_a_damaged_source_is_refused(tmp_path, capsys, which):
    sources = [made(tmp_path / name, seed) for seed, name in enumerate("ab")]
    file = sources[which] / "state" / "rank_00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert average.main([*map(str, sources), str(tmp_path / "out")]) == 2
    assert f"checkpoint {sources[which]} is damaged" in capsys.readouterr().err and not (tmp_path / "out").exists()
