"""Sums over programs against torch's in float64."""

import pytest
import torch

from tests.ops.devices import DEVICES
from tests.ops.kernel_checks import error

pytest.importorskip("triton")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows, columns", [(1, 1), (64, 32), (132, 4096), (65, 33)])
def test_sums_of_one_and_of_several(device, rows, columns):
    from megatron_taipan.ops.column_sums_triton import column_sums

    parts = torch.randn(3, rows, columns, generator=torch.Generator().manual_seed(0)).to(device)
    assert error(column_sums(parts, torch.float32), parts.double().sum(1)) < 1e-6
    assert error(column_sums(parts[1], torch.float32), parts[1].double().sum(0)) < 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_a_convolutions_sums(device):
    from megatron_taipan.ops.column_sums_triton import column_sums, weight_and_bias_sums

    parts = torch.randn(70, 5, 37, generator=torch.Generator().manual_seed(0)).to(device)
    expected = parts.double().sum(0)
    weight, bias = weight_and_bias_sums(parts, torch.float32)
    assert error(weight, expected[:4].t()) < 1e-6 and error(bias, expected[4]) < 1e-6
    assert error(column_sums(parts[:, 4], torch.float16), expected[4]) < 1e-3  # rows that lie apart
