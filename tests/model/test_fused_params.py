"""Parameters joined along their rows: a view where they adjoin, a copy elsewhere, the same gradients in both."""

import pytest
import torch
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from megatron_taipan.model.fused_params import adjoin, join_rows, take_rows

SHAPES = [(8, 6), (4, 6), (4, 6), (2, 6)]


def flat_parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    """Parameters that are slices of one flat buffer, in order, as DeepSpeed leaves them."""
    values = [torch.randn(shape) for shape in shapes]
    return [nn.Parameter(t) for t in _unflatten_dense_tensors(_flatten_dense_tensors(values), values)]


def gradients(join, parts: list[nn.Parameter]) -> list[torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(3, 6)
    out = nn.functional.linear(x, join(*parts)) * torch.randn(3, sum(len(part) for part in parts))
    return [out, *torch.autograd.grad(out.sum(), parts)]


@pytest.mark.parametrize("flat", [True, False])
def test_joined_rows_are_the_concatenation(flat):
    parts = flat_parameters(SHAPES) if flat else [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    joined = join_rows(*parts)
    assert (joined.data_ptr() == parts[0].data_ptr()) == flat
    assert joined.is_contiguous()
    expected = gradients(lambda *t: torch.cat(t), parts)
    assert all(torch.equal(a, b) for a, b in zip(gradients(join_rows, parts), expected, strict=True))


@pytest.mark.parametrize(("first", "n"), [(0, 6), (2, 3), (0, 4)])
def test_rows_are_the_slice_and_all_of_them_the_tensor(first, n):
    t = torch.randn(6, 4, requires_grad=True)
    rows = take_rows(t, first, n)
    assert torch.equal(rows, t[first : first + n]) and (rows is t) == (n == 6)
    (gradient,) = torch.autograd.grad(rows.square().sum(), t)
    expected = torch.zeros(6, 4)
    expected[first : first + n] = 2 * t.detach()[first : first + n]
    assert torch.equal(gradient, expected)


def test_parts_out_of_order_with_a_gap_or_of_another_type_do_not_adjoin():
    a, b, c, d = flat_parameters(SHAPES)
    assert adjoin((a, b, c, d)) and adjoin((b, c))
    assert not adjoin((b, a))
    assert not adjoin((a, c))
    assert not adjoin((a.t(), b.t()))
    x = torch.zeros(16)
    assert not adjoin((x[:8].view(2, 4), x[8:].view(torch.int32).view(2, 4)))
    assert not adjoin((x[:8].view(2, 4), x[8:].view(4, 2)))


def test_a_change_of_a_part_before_backward_is_noticed():
    parts = flat_parameters(SHAPES)
    x = torch.randn(3, 6, requires_grad=True)
    out = nn.functional.linear(x, join_rows(*parts)).sum()
    with torch.no_grad():
        parts[0].add_(1)
    with pytest.raises(RuntimeError, match="modified.*inplace"):
        out.backward()
