"""SwiGLU's product and the chunked cross entropy in Triton against float64."""

import pytest
import torch
import torch.nn.functional as F

from megatron_taipan.ops.swiglu import silu_mul_reference
from tests.ops.kernel_checks import TOLERANCE, assert_close, error

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")


def test_silu_mul():
    from megatron_taipan.ops.swiglu_triton import silu_mul

    inputs = [torch.randn(3, 1001, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    assert_close(silu_mul, silu_mul_reference, inputs, TOLERANCE[torch.bfloat16])


def test_a_tall_gradient_is_made_in_two_products(monkeypatch):
    """Of columns of a larger tensor, as the 1.3B presets' in_proj has them."""
    from megatron_taipan.ops.weight_gradient import weight_gradient

    rows = torch.randn(300, 8600, device="cuda", dtype=torch.bfloat16)[:, :8512]
    x = torch.randn(300, 64, device="cuda", dtype=torch.bfloat16)
    products, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: (products.append(len(a)), mm(a, b, out=out)))
    found = weight_gradient(rows, x)
    assert products == [8320, 192]
    assert error(found, rows.double().t() @ x.double()) < 4e-3
    assert torch.equal(weight_gradient(rows[:, :8192], x), rows[:, :8192].t() @ x)  # nothing to cut


def test_cross_entropy_in_chunks_with_padded_vocabulary(monkeypatch):
    from megatron_taipan.ops import cross_entropy_triton

    monkeypatch.setattr(cross_entropy_triton, "CHUNK_ELEMENTS", 1 << 20)  # several chunks, the last one short
    hidden = torch.randn(701, 256, device="cuda", dtype=torch.bfloat16)
    weight = (torch.randn(5003, 256, device="cuda") * 0.1).bfloat16()
    weight[5000:] *= 10  # padding that would take most of a softmax which did not leave it out
    labels, scale = torch.randint(0, 5000, (701,), device="cuda"), torch.rand(701, device="cuda")

    def reference(h, w):
        return (F.cross_entropy((h @ w.t())[:, :5000], labels, reduction="none") * scale).sum()

    assert_close(
        lambda h, w: cross_entropy_triton.linear_cross_entropy(h, w, labels, scale, n_valid=5000), reference,
        [hidden, weight], 1e-2,
    )  # fmt: skip


def test_cross_entropy_in_fp16_keeps_gradients_below_its_smallest_number():
    from megatron_taipan.ops import cross_entropy_triton

    hidden = torch.randn(512, 128, device="cuda", dtype=torch.float16, requires_grad=True)
    weight = (torch.randn(8192, 128, device="cuda") * 0.05).half().requires_grad_()
    labels, scale = torch.randint(0, 8192, (512,), device="cuda"), torch.full((512,), 1e-5, device="cuda")
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    loss = (F.cross_entropy(exact[0] @ exact[1].t(), labels, reduction="none") * scale).sum()
    upstream = torch.tensor(2.0**16, device="cuda")  # beyond fp16's largest number
    expected = torch.autograd.grad(loss, exact, grad_outputs=upstream.double())
    loss = cross_entropy_triton.linear_cross_entropy(hidden, weight, labels, scale)
    for got, wanted in zip(torch.autograd.grad(loss, (hidden, weight), grad_outputs=upstream), expected, strict=True):
        assert error(got, wanted) < TOLERANCE[torch.float16]
