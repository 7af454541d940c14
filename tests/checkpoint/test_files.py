"""Our safetensors writer against the safetensors library."""

import hashlib
import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_taipan.checkpoint.files import TYPES, TensorFile, write_tensors
from megatron_taipan.checkpoint.reader import INDEX, StateReader
from tests.inference.networks import small_config


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), max_size=5),
    dtypes=st.lists(st.sampled_from(list(TYPES)), min_size=5, max_size=5),
)
def test_the_library_reads_back_the_same_tensors(tmp_path_factory, shapes, dtypes):
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    tensors = {
        f"tensor {i}|é": (100 * torch.randn(shape)).to(dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }
    size, digest = write_tensors(path, tensors)
    content = path.read_bytes()
    assert (size, digest) == (len(content), hashlib.sha256(content).hexdigest())
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)


def test_larger_than_one_write(tmp_path):
    tensors = {"a": torch.arange(5_000_000, dtype=torch.float32), "b": torch.arange(3, dtype=torch.int64)}
    size, digest = write_tensors(tmp_path / "x.safetensors", tensors)
    assert hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest() == digest and size > 20_000_000
    assert all(torch.equal(t, tensors[n]) for n, t in load_file(tmp_path / "x.safetensors").items())


def test_given_in_any_order_and_never_given(tmp_path):
    specs = {"a": ((2, 3), torch.float32), "b": ((4,), torch.bfloat16), "c": ((), torch.uint8)}
    file = TensorFile(tmp_path / "file.safetensors", specs)
    file.put("b", torch.arange(4.0))
    file.put("a", torch.arange(6.0).view(2, 3))
    with pytest.raises(ValueError, match=r"a has shape \(3,\), not \(2, 3\)"):
        file.put("a", torch.zeros(3))
    file.finish()
    found = load_file(tmp_path / "file.safetensors")
    assert torch.equal(found["a"], torch.arange(6.0).view(2, 3))
    assert torch.equal(found["b"], torch.arange(4.0).bfloat16())
    assert found["c"] == 0


def test_a_state_larger_than_the_memory_can_be_read(tmp_path):
    """A file of 4 TB, nearly all of it a hole."""
    config = small_config("M", vocab_size=10**9, d_model=1000, d_ff=32, mamba={"headdim": 500, "d_state": 8})
    size = 10**12
    (tmp_path / "state").mkdir()
    specs = {"embedding.weight|master": ((size,), torch.float32)}
    file = TensorFile(tmp_path / "state" / "rank_00000.safetensors", specs)
    with open(file.path, "r+b") as raw:
        raw.seek(-8, os.SEEK_END)
        raw.write(torch.tensor([1.5, 2.5]).numpy().tobytes())
    index = {
        "parameters": {"embedding.weight": [["rank_00000.safetensors", 0, 0, size]]}, "buffers": {}, "tensor": 1,
        "optimizer_step": 0, "scaler": None,
    }  # fmt: skip
    (tmp_path / INDEX).write_text(json.dumps(index))
    reader = StateReader(tmp_path, config)
    spec = reader.table["embedding.weight"]
    assert reader.elements("embedding.weight", "master", spec, 1, 0, size - 3, 3).tolist() == [0.0, 1.5, 2.5]
