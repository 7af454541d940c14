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
def test_a_view_of_rows_that_lie_apart_is_summed_and_turned(device):
    """As the convolution leaves them: [runs, width + 1, channels], the last of width + 1 the bias's."""
    from megatron_taipan.ops.column_sums_triton import column_sums

    parts = torch.randn(70, 5, 37, generator=torch.Generator().manual_seed(0)).to(device)
    turned = column_sums(parts[:, :4], torch.float32, turned=True)
    assert turned.is_contiguous() and turned.shape == (37, 4)
    assert error(turned, parts[:, :4].double().sum(0).t()) < 1e-6
    assert error(column_sums(parts[:, 4], torch.float16), parts[:, 4].double().sum(0)) < 1e-3
