"""The rotary embedding: against complex numbers on any machine, its kernel on a GPU or with TRITON_INTERPRET=1."""

import pytest
import torch

from megatron_taipan.ops.rope import rotary_tables, rotate_reference
from tests.ops.devices import DEVICES
from tests.ops.kernel_checks import TOLERANCE, error, poison, with_gradients


@pytest.mark.parametrize("width", [2, 6, 16])
def test_pairs_turn_as_complex_numbers(width):
    x, position = torch.randn(9, 3, width, dtype=torch.float64), torch.randint(0, 5000, (9,))
    speed = 500.0 ** (-2 * torch.arange(width // 2, dtype=torch.float64) / width)
    turned = (
        torch.complex(x[..., : width // 2], x[..., width // 2 :]) * torch.exp(1j * position[:, None] * speed)[:, None]
    )
    got = rotate_reference(x, *rotary_tables(position, width, 500.0, x.dtype))
    torch.testing.assert_close(got, torch.cat([turned.real, turned.imag], -1), rtol=0, atol=1e-12)


def test_tables_are_float32_for_narrow_operands_and_float64_for_wide_ones():
    types = {torch.bfloat16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    assert {t: rotary_tables(torch.arange(3), 8, 1e4, t)[0].dtype for t in types} == types


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "heads", "width"), [(37, 3, 128), (5, 16, 64), (11, 1, 6), (1, 1, 2)])
def test_kernel(device, dtype, n, heads, width):
    pytest.importorskip("triton")
    from megatron_taipan.ops.rope_triton import rotate

    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter cuts bf16 off where a GPU rounds")
    if device == "cuda":
        poison()
    tables = rotary_tables(torch.randint(0, 100_000, (n,), device=device), width, 5e5, dtype)
    wide = torch.randn(n, heads + 1, width + 3, device=device).to(dtype)  # rows and heads lie apart

    def of(kernel):
        return lambda x: kernel(x[:, 1:, :width], *tables)

    expected, got = (with_gradients(of(f), [t]) for f, t in ((rotate_reference, wide.double()), (rotate, wide)))
    assert got[0].dtype == dtype and all(error(a, b) < TOLERANCE[dtype] for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
def test_no_tokens():
    pytest.importorskip("triton")
    from megatron_taipan.ops.rope_triton import rotate

    empty = torch.zeros(0, 4, 64, device="cuda")
    assert rotate(empty, empty[:, 0, :32], empty[:, 0, :32]).shape == (0, 4, 64)
