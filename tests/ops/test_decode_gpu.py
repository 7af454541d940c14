"""The kernels of a decoded token against their references in float64; on a GPU or with TRITON_INTERPRET=1."""

import pytest
import torch

from megatron_taipan.ops.causal_conv1d import causal_conv1d_reference
from megatron_taipan.ops.decode import conv_update_reference, decode_attention_reference, ssd_update_reference
from megatron_taipan.ops.ssd import ssd_reference
from tests.ops.devices import interpreted_only
from tests.ops.kernel_checks import TOLERANCE, error, poison

pytest.importorskip("triton")
CASES = [
    *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.bfloat16, torch.float16, torch.float32)),
    # the interpreter cuts bf16 off where a GPU rounds
    pytest.param("cpu", torch.float32, marks=interpreted_only),
]
on_devices = pytest.mark.parametrize(("device", "dtype"), CASES)


def normal(*shape, device, dtype=torch.float32):
    return torch.randn(*shape, device=device).to(dtype)


def poisoned(device):
    if device == "cuda":
        poison(64)


@on_devices
@pytest.mark.parametrize("some", [True, False])
@pytest.mark.parametrize(
    ("b", "heads", "key_heads", "d", "slots", "window"),
    [(1, 4, 4, 16, 600, 300), (3, 4, 2, 16, 700, None), (2, 2, 2, 24, 96, 48), (3, 4, 1, 128, 4096, 2048)],
)
def test_attention_of_one_query_a_row(b, heads, key_heads, d, slots, window, some, device, dtype):
    """Three tokens, q, k and v columns of one product; the buffers' first slot is token 1000."""
    from megatron_taipan.ops.decode_triton import decode_attention

    wide = normal(3, b, (heads + 2 * key_heads) * d, device=device, dtype=dtype)
    buffers = [normal(b, slots, key_heads, d, device=device, dtype=dtype) for _ in range(2)]
    newest = slots - 20
    oldest = 1000 + max(0, newest - 2 * (window or slots))
    start = torch.randint(oldest, 1000 + newest, (b, 2), device=device)[:, 1]  # every second number
    start[-1] = 1000 + newest  # sees itself alone at first
    first = torch.tensor(1000, device=device)
    chosen = torch.arange(b, device=device) % 2 == 0 if some else None
    for row in range(b):  # what no query may see is poison
        lowest = max(int(start[row]) - 1000, newest - (window or slots) + 1)
        for buffer in buffers:
            buffer[row, :lowest], buffer[row, newest:] = float("nan"), float("nan")
    exact = [t.nan_to_num(0).double() for t in buffers]
    poisoned(device)
    for place, token in enumerate(wide, newest):
        q, k, v = token.unflatten(1, (-1, d)).split([heads, key_heads, key_heads], 1)
        position = torch.tensor([1000 + place], device=device)
        got = decode_attention(q, k, v, *buffers, first, position, start, window, chosen)
        rest = first, position, start, window, chosen
        expected = decode_attention_reference(q.double(), k.double(), v.double(), *exact, *rest)
        assert error(got, expected) < TOLERANCE[dtype]
        assert not some or b == 1 or (got[1] == 0).all()
        assert all(torch.equal(t.nan_to_num(0).double(), e) for t, e in zip(buffers, exact, strict=True))


@on_devices
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("b", "channels", "width"), [(1, 4352, 4), (3, 200, 4), (3, 72, 3), (2, 33, 2)])
def test_convolution_moves_its_tail_on(b, channels, width, bias, device, dtype):
    """Several tokens, columns of a wider tensor, the tail in the memory that a prefill left it in."""
    from megatron_taipan.ops.decode_triton import conv_update

    wide = normal(6, b, channels + 40, device=device, dtype=dtype)
    weight = normal(channels, width, device=device, dtype=dtype)
    offset = normal(channels, 2, device=device, dtype=dtype)[:, 1] if bias else None  # every second number
    before = normal(b, 5, channels, device=device, dtype=dtype)
    tail = before.clone()[:, 6 - width :]
    exact = [None if t is None else t.double() for t in (weight, offset)]
    last = before[:, 6 - width :].double()
    poisoned(device)
    for token in wide:
        x = token[:, 7 : 7 + channels]
        expected = conv_update_reference(last, x.double(), *exact)
        assert error(conv_update(tail, x, weight, offset), expected) < TOLERANCE[dtype]
        assert torch.equal(tail.double(), last)
    inputs = torch.cat([before[:, 6 - width :], wide[:, :, 7 : 7 + channels].transpose(0, 1)], 1).double()
    assert error(expected, causal_conv1d_reference(inputs, *exact)[:, -1]) < 1e-12


def test_convolution_refuses_a_tail_whose_channels_lie_apart():
    from megatron_taipan.ops.decode_triton import conv_update

    with pytest.raises(ValueError, match=r"strides \(24, 1, 3\)"):
        conv_update(torch.zeros(2, 8, 3).transpose(1, 2), torch.zeros(2, 8), torch.zeros(8, 4))


def test_a_state_that_is_not_contiguous_is_refused():
    from megatron_taipan.ops.decode_triton import ssd_update

    with pytest.raises(ValueError, match="must be contiguous"):
        ssd_update(torch.zeros(1, 2, 8, 4).transpose(2, 3), *[torch.zeros(1)] * 6)


@on_devices
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("sizes", [(1, 4, 2, 16, 32), (2, 4, 2, 8, 16), (3, 2, 1, 64, 24), (3, 64, 1, 64, 128)])
def test_update_of_the_state_in_place(sizes, skip, device, dtype):
    """Four tokens of columns that one product gave, against the steps and the scan of them all."""
    from megatron_taipan.ops.decode_triton import ssd_update

    b, h, g, p, n = sizes
    parts = [h * p, g * n, g * n, h]
    state, wide = normal(b, h, p, n, device=device), normal(4, b, sum(parts), device=device, dtype=dtype)
    dt_bias, A_log, D = normal(h, 3, device=device).unbind(1)  # every third number
    dt_bias, A_log = dt_bias.mul_(4).sub_(3), A_log.sigmoid_().mul_(3)
    x, B, C, dt = wide.split(parts, -1)
    x, B, C = x.unflatten(-1, (h, p)), B.unflatten(-1, (g, n)), C.unflatten(-1, (g, n))
    exact, initial, D = state.double(), state.double(), D if skip else None
    poisoned(device)
    for t in range(4):
        got = ssd_update(state, x[t], dt[t], dt_bias, A_log, B[t], C[t], D)
        given = [None if a is None else a.double() for a in (x[t], dt[t], dt_bias, A_log, B[t], C[t], D)]
        expected = ssd_update_reference(exact, *given)
        assert error(got, expected) < TOLERANCE[dtype]
        assert error(state, exact) < 1e-5
    x, B, C, dt = (t.transpose(0, 1).double() for t in (x, B, C, dt))
    steps, A = torch.nn.functional.softplus(dt + dt_bias.double()), -A_log.double().exp()
    skipped = None if D is None else D.double()
    y, last = ssd_reference(x, steps, A, B, C, chunk_size=2, D=skipped, initial_state=initial, return_state=True)
    assert error(expected, y[:, -1]) < 1e-12 and error(exact, last) < 1e-12
