"""Products and copies of picked rows in Triton against float64, whatever lies in a buffer behind the last row."""

import pytest
import torch

from megatron_taipan.ops.refine import refine_reference
from megatron_taipan.ops.selected_rows import (
    bounded_linear_reference,
    gather_linear_reference,
    scatter_rows_reference,
    select_rows_reference,
)
from tests.ops.kernel_checks import TOLERANCE, assert_close, error, poison, with_gradients

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")

SIZES = [(1000, 96, 160, 0.15), (129, 64, 32, 0.0), (257, 33, 70, 1.0), (1, 16, 16, 1.0), (4096, 512, 256, 0.5)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("n", "d", "e", "density"), SIZES)
def test_picked_rows_through_two_products_and_back(n, d, e, density, dtype):
    from megatron_taipan.ops.selected_rows_triton import bounded_linear, gather_linear, scatter_rows, select_rows

    x = torch.randn(n, d, device="cuda", dtype=dtype)
    weights = [(torch.randn(*s, device="cuda") / s[1] ** 0.5).to(dtype) for s in ((e, d), (d, e))]
    selected = torch.rand(n, device="cuda") < density
    poison()
    rows, known = select_rows(x, selected), select_rows_reference(x, selected)
    count = int(rows.n_valid)
    assert count == len(known.at) and torch.equal(rows.at[:count], known.at)

    def through(x, first, second, rows, gather, bounded, scatter):
        return scatter(bounded(gather(x, first, rows), second, rows), rows, n)

    references = (gather_linear_reference, bounded_linear_reference, scatter_rows_reference)
    kernels = (gather_linear, bounded_linear, scatter_rows)
    expected = with_gradients(lambda *t: through(*t, known, *references), [t.double() for t in (x, *weights)])
    poison()
    got = with_gradients(lambda *t: through(*t, rows, *kernels), [x, *weights])
    assert all(error(a, b) < 2 * TOLERANCE[dtype] for a, b in zip(got, expected, strict=True) if b.norm() > 0)
    assert not any(a.any() for a, b in zip(got, expected, strict=True) if b.norm() == 0)
    again = with_gradients(lambda *t: through(*t, rows, *kernels), [x, *weights])
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))  # the same bits each time


def test_a_tile_behind_the_last_row_holds_zeros():
    from megatron_taipan.ops.selected_rows_triton import TILE, gather_linear, scatter_rows, select_rows

    x = torch.randn(1000, 64, device="cuda", requires_grad=True)
    rows = select_rows(x, torch.arange(1000, device="cuda") % 7 == 0)
    count = int(rows.n_valid)
    poison()
    y = gather_linear(x, torch.randn(32, 64, device="cuda"), rows)
    assert not y[count : count + TILE].any()
    poison()
    (dy,) = torch.autograd.grad(scatter_rows(y, rows, 1000).sum(), y)
    assert not dy[count : count + TILE].any() and bool((dy[:count] == 1).all())


@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize("width", [2048, 100])
def test_refinement(width, every, add):
    from megatron_taipan.ops.refine_triton import refine

    h = torch.randn(3, 77, width, device="cuda")
    o = torch.randn(3, 77, width, device="cuda", dtype=torch.bfloat16)
    weight = torch.rand(3, 77, device="cuda") * (torch.rand(3, 77, device="cuda") < 0.3)
    kept = (weight != 0) | every

    def run(function):
        return lambda h, o, w: function(h, o, torch.where(kept, w, 0), zero_is_unselected=not every, add=add)

    assert_close(run(refine), run(refine_reference), [h, o, weight], TOLERANCE[torch.bfloat16])
    o[weight == 0] = float("nan")
    assert torch.equal(refine(h, o, weight, add=add)[weight == 0], h[weight == 0])
