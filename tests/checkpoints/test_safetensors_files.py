"""Files written one tensor at a time are what the safetensors library reads."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from checkpoints.safetensors_files import write_sharded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(shapes, st.sampled_from(DTYPES)), min_size=1, max_size=8), st.integers(1, 400))
def test_every_tensor_comes_back(tmp_path_factory, specs, limit):
    folder = tmp_path_factory.mktemp("weights")
    tensors = {f"t{i}": torch.randn(shape) for i, (shape, _) in enumerate(specs)}
    stored = {f"t{i}": spec for i, spec in enumerate(specs)}
    files = write_sharded(folder, stored, tensors.__getitem__, limit)
    found = {}
    for file in files:
        part = load_file(file)
        assert len(part) == 1 or sum(t.numel() * t.element_size() for t in part.values()) <= limit
        found |= part
    assert list(found) and set(found) == set(tensors)
    for name, (_, dtype) in stored.items():
        assert torch.equal(found[name], tensors[name].to(dtype)) and found[name].dtype == dtype
    if len(files) > 1:
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        for name, file in index["weight_map"].items():
            with safe_open(folder / file, "pt") as opened:
                assert name in opened.keys()
        assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in found.values())
    else:
        assert files[0].name == "model.safetensors"


def test_each_tensor_is_asked_for_once(tmp_path):
    asked = []

    def load(name: str) -> torch.Tensor:
        asked.append(name)
        return torch.zeros(3)

    write_sharded(tmp_path, dict.fromkeys("abc", ((3,), torch.float32)), load, 12)
    assert asked == ["a", "b", "c"]


def test_a_wrong_shape_is_noticed(tmp_path):
    with pytest.raises(ValueError, match=r"t has shape \(2,\), not \(3,\)"):
        write_sharded(tmp_path, {"t": ((3,), torch.float32)}, lambda name: torch.zeros(2))
