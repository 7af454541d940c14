"""Many copies at once, against one by one."""

import pytest
import torch

from megatron_taipan.ops.copies import copy_all


def test_every_tensor_is_copied_whatever_its_type():
    given = [torch.bfloat16, torch.float32, torch.bfloat16, torch.float64]
    wanted = [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    tensors = [torch.randn(3, i + 1, dtype=torch.float64).to(dtype) for i, dtype in enumerate(given)]
    to = [torch.empty_like(t, dtype=dtype) for t, dtype in zip(tensors, wanted, strict=True)]
    copy_all(to, tensors)
    for a, b in zip(to, tensors, strict=True):
        assert torch.equal(a, b.to(a.dtype))


def test_lists_of_different_lengths_are_refused():
    with pytest.raises(ValueError):
        copy_all([torch.empty(1)], [])
