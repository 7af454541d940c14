"""The kernels of a decoded token against their references in float64."""

import pytest
import torch

from megatron_taipan.ops.decode import decode_attention_reference, ssd_update_reference
from tests.ops.kernel_checks import TOLERANCE, error, poison

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def normal(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [(3, 4, 2, 16, 700, 600), (2, 2, 2, 24, 96, 48), (5, 16, 16, 128, 4096, 2048)])
def test_attention_of_one_query_a_row(case, dtype):
    from megatron_taipan.ops.decode_triton import decode_attention

    b, heads, key_heads, d, slots, window = case
    q = normal(b, heads, d, dtype=dtype)
    keys, values = (normal(b, slots, key_heads, d, dtype=dtype) for _ in range(2))
    lo = torch.randint(0, slots - window + 1, (b,), device="cuda")
    hi = lo + torch.randint(0, window, (b,), device="cuda")
    hi[0], hi[1] = lo[0] - 1, lo[1] + window - 1  # nothing, and the whole window
    for row in range(b):  # what no query may see is poison
        keys[row, : lo[row]], keys[row, hi[row] + 1 :] = float("nan"), float("nan")
        values[row, : lo[row]], values[row, hi[row] + 1 :] = float("nan"), float("nan")
    poison(64)
    got = decode_attention(q, keys, values, lo, hi, window)
    clean = [t.nan_to_num(0).double() for t in (keys, values)]
    assert error(got, decode_attention_reference(q.double(), *clean, lo, hi, window)) < TOLERANCE[dtype]
    assert (got[0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(2, 4, 2, 8, 16), (3, 2, 1, 64, 24), (64, 64, 1, 64, 128)])
def test_update_of_the_state_in_place(sizes, dtype):
    from megatron_taipan.ops.decode_triton import ssd_update

    b, h, g, p, n = sizes
    state, wide = normal(b, h, p, n), normal(b, h * p + 2 * g * n, dtype=dtype)
    x, B, C = wide.split([h * p, g * n, g * n], -1)  # columns of one tensor, as the layer has them
    x, B, C = x.unflatten(-1, (h, p)), B.unflatten(-1, (g, n)), C.unflatten(-1, (g, n))
    dt, A, D = torch.rand(b, h, device="cuda"), -torch.rand(h, device="cuda"), normal(h)
    exact = state.double()
    expected = ssd_update_reference(exact, *(t.double() for t in (x, dt, A, B, C, D)))
    assert error(ssd_update(state, x, dt, A, B, C, D), expected) < TOLERANCE[dtype]
    assert error(state, exact) < 1e-5
