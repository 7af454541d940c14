"""Documents that begin at the row's ends and about the border of a run of tokens, against the reference in float64."""

import pytest
import torch

from megatron_taipan.ops.causal_conv1d import causal_conv1d_reference
from tests.ops.devices import DEVICES
from tests.ops.kernel_checks import error, with_gradients

pytest.importorskip("triton")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("begins", range(1, 16))
def test_a_document_may_begin_anywhere(monkeypatch, device, begins):
    """Runs of eight tokens, of which the second one reads three of the first and gives gradients to them."""
    from megatron_taipan.ops import causal_conv1d_triton as convolution

    monkeypatch.setattr(convolution, "tokens_of_run", lambda *_: 8)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(*shape, generator=generator).to(device) for shape in ((2, 16, 5), (5, 4), (5,))]
    seq_idx = torch.zeros(2, 16, dtype=torch.int32, device=device)
    seq_idx[1, begins:] = 1
    expected = with_gradients(lambda *t: causal_conv1d_reference(*t, seq_idx=seq_idx), [t.double() for t in inputs])
    got = with_gradients(lambda *t: convolution.causal_conv1d(*t, seq_idx=seq_idx), inputs)
    errors = [error(a, b) for a, b in zip(got, expected, strict=True)]
    assert all(e < 1e-6 for e in errors), errors
