"""Our safetensors writer against the safetensors library."""

import hashlib

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from megatron_taipan.checkpoint.tensorfile import TYPES, write_tensors


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
