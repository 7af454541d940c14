"""The short convolution against torch's, document by document."""

import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_taipan.ops.causal_conv1d import causal_conv1d_reference


def torchs(x: Tensor, weight: Tensor, bias: Tensor | None, before: Tensor | None = None) -> Tensor:
    """silu(conv1d) of [b, l, c], zeros or `before` [b, w-1, c] in front."""
    w = weight.shape[1]
    before = x.new_zeros(x.shape[0], w - 1, x.shape[2]) if before is None else before
    rows = torch.cat([before, x], 1).transpose(1, 2)
    return F.silu(F.conv1d(rows, weight[:, None], bias, groups=weight.shape[0])).transpose(1, 2)


def inputs(b: int, l: int, c: int = 3, w: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(l)
    return tuple(torch.randn(*s, generator=made, dtype=torch.float64) for s in ((b, l, c), (c, w), (c,)))


@settings(max_examples=30)
@given(st.integers(1, 9), st.integers(2, 5), st.booleans(), st.booleans())
def test_equals_torchs_convolution(l, w, with_bias, with_tail):
    x, weight, bias = inputs(2, l, w=w)
    bias = bias if with_bias else None
    tail = torch.randn(2, w - 1, 3, dtype=torch.float64) if with_tail else None
    y, last = causal_conv1d_reference(x, weight, bias, initial_tail=tail, return_tail=True)
    torch.testing.assert_close(y, torchs(x, weight, bias, tail), rtol=0, atol=1e-12)
    before = torch.zeros(2, w - 1, 3, dtype=torch.float64) if tail is None else tail
    assert torch.equal(last, torch.cat([before, x], 1)[:, -(w - 1) :])


@settings(max_examples=30)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.data())
def test_packed_and_cut_anywhere_equals_each_document_alone(lengths, data):
    """Also the returned tail: it holds inputs of the last token's document only."""
    l = sum(lengths)
    x, weight, bias = inputs(1, l)
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    alone = torch.cat([torchs(part, weight, bias) for part in x.split(lengths, 1)], 1)
    cuts = [0, *sorted(data.draw(st.sets(st.integers(1, max(1, l - 1)), max_size=3))), l] if l > 1 else [0, 1]
    tail, parts = None, []
    for start, end in zip(cuts, cuts[1:], strict=False):
        if start and seq_idx[0, start] != seq_idx[0, start - 1]:
            tail = None
        piece = seq_idx[:, start:end]
        y, tail = causal_conv1d_reference(
            x[:, start:end], weight, bias, seq_idx=piece, initial_tail=tail, return_tail=True
        )
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), alone, rtol=0, atol=1e-12)


def test_gradients_equal_torchs_with_and_without_documents():
    lengths = [3, 1, 5]
    seq_idx = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None].expand(2, -1)
    for packed in (False, True):
        x, weight, bias = (t.requires_grad_() for t in inputs(2, 9))
        parts = x.split(lengths, 1) if packed else (x,)
        expected = torch.cat([torchs(part, weight, bias) for part in parts], 1)
        ours = causal_conv1d_reference(x, weight, bias, seq_idx=seq_idx if packed else None)
        upstream = torch.randn_like(ours)
        for a, b in zip(*(torch.autograd.grad(y, (x, weight, bias), upstream) for y in (ours, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
