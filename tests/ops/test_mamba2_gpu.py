"""The Triton kernels between a Mamba-2 mixer's projections against the references in float64."""

from functools import partial

import pytest
import torch

from megatron_taipan.ops.causal_conv1d import causal_conv1d_reference
from megatron_taipan.ops.norms import gated_rms_norm_reference
from megatron_taipan.ops.ssd import ssd_reference
from tests.ops.copy_engine import assert_engine_changes_nothing
from tests.ops.kernel_checks import TOLERANCE, assert_close, error, poison, with_gradients
from tests.ops.mamba2_reference import kept_and_projected, mix_reference, mixed_again
from tests.ops.pieces import mix_in_pieces
from tests.ops.spread import gated_norm_over_ranks, mix_over_ranks

pytestmark = pytest.mark.gpu
pytest.importorskip("triton")


def documents(b: int, l: int) -> torch.Tensor:
    return (torch.rand(b, l, device="cuda") < 0.01).cumsum(1).int()


@pytest.mark.parametrize(
    "dtype, b, l, heads, headdim, groups, d_state, packed",
    [
        (torch.bfloat16, 2, 517, 4, 64, 1, 128, True),
        (torch.bfloat16, 1, 2051, 4, 64, 2, 64, False),  # long and narrow: the sequence is cut in segments
        # heads that cannot be split: dB and dC are written in place; eleven, because A's gradient cancels in each
        (torch.bfloat16, 2, 300, 11, 64, 1, 128, True),
        (torch.float16, 1, 300, 4, 32, 1, 16, True),
        (torch.float32, 1, 131, 2, 16, 1, 16, True),
        # rows of whole chunks: tiles by the copy engine
        (torch.bfloat16, 2, 512, 11, 64, 1, 128, True),
        (torch.bfloat16, 1, 2048, 4, 64, 2, 64, False),
        (torch.bfloat16, 1, 192, 11, 128, 1, 128, True),  # the largest tiles
        (torch.float16, 1, 320, 4, 32, 1, 16, True),
    ],
)
def test_fused_mixer(dtype, b, l, heads, headdim, groups, d_state, packed):
    from megatron_taipan.ops.mamba2_triton import mamba2_mix

    channels = heads * headdim + 2 * groups * d_state
    seq_idx = documents(b, l) if packed else None
    inputs = [
        torch.randn(b, l, heads * headdim + channels + heads).to(dtype), (torch.randn(channels, 4) * 0.4).to(dtype),
        (torch.randn(channels) * 0.1).to(dtype), torch.randn(heads) - 2, -torch.rand(heads) * 8 - 1, torch.randn(heads),
        torch.randn(heads * headdim).to(dtype),
    ]  # fmt: skip
    sizes = {"seq_idx": seq_idx, "headdim": headdim, "groups": groups, "d_state": d_state}
    assert_close(
        lambda *t: mamba2_mix(*t, **sizes, group_size=heads * headdim // groups, eps=1e-5),
        lambda *t: mix_reference(*t, **sizes), [t.cuda() for t in inputs], 2 * TOLERANCE[dtype],
    )  # fmt: skip


@pytest.mark.parametrize(
    "dtype, b, headdim, d_state, ends, packed",
    [
        (torch.bfloat16, 2, 64, 128, [300, 517], True),
        (torch.bfloat16, 2, 64, 128, [320, 512], True),  # of whole chunks
        (torch.bfloat16, 1, 64, 128, [1100, 2200, 3300], False),  # segments in every piece
        (torch.float32, 2, 16, 16, [64, 67, 131], True),
    ],
)
def test_fused_mixer_in_pieces(dtype, b, headdim, d_state, ends, packed):
    """The pieces of a row one after the other on this GPU against the whole in float64."""
    heads, l = 11, ends[-1]
    channels = heads * headdim + 2 * d_state
    seq_idx = documents(b, l) if packed else None
    if packed:  # documents that begin on, and just before, a border
        seq_idx = (
            seq_idx + (torch.arange(l, device="cuda") >= ends[0]) + (torch.arange(l, device="cuda") >= ends[-2] - 1)
        )
        seq_idx = seq_idx.int()
    inputs = [
        torch.randn(b, l, heads * headdim + channels + heads).to(dtype), (torch.randn(channels, 4) * 0.4).to(dtype),
        (torch.randn(channels) * 0.1).to(dtype), torch.randn(heads) - 5, -torch.rand(heads) * 8 - 1, torch.randn(heads),
        torch.randn(heads * headdim).to(dtype),
    ]  # fmt: skip
    sizes = {"seq_idx": seq_idx, "headdim": headdim, "groups": 1, "d_state": d_state}
    assert_close(
        lambda *t: mix_in_pieces(t, sizes, ends, group_size=heads * headdim, eps=1e-5),
        lambda *t: mix_reference(*t, **sizes), [t.cuda() for t in inputs], 2 * TOLERANCE[dtype],
    )  # fmt: skip


def test_pieces_that_compute_again_give_the_same_bits():
    b, heads, headdim, d_state, ends = 1, 4, 64, 64, [1100, 2300]
    channels = heads * headdim + 2 * d_state
    inputs = [
        torch.randn(b, ends[-1], heads * headdim + channels + heads).bfloat16(), torch.randn(channels, 4).bfloat16(),
        torch.randn(channels).bfloat16(), torch.randn(heads) - 5, -torch.rand(heads) * 8 - 1, torch.randn(heads),
        torch.randn(heads * headdim).bfloat16(),
    ]  # fmt: skip
    inputs = [t.cuda() for t in inputs]
    sizes = {"seq_idx": documents(b, ends[-1]), "headdim": headdim, "groups": 1, "d_state": d_state}
    results = []
    for recompute in ((), ("states", "conv")):
        options = {"group_size": heads * headdim, "eps": 1e-5, "recompute": recompute}
        results.append(with_gradients(lambda *t, o=options: mix_in_pieces(t, sizes, ends, **o), inputs))
        poison()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fused_mixer_whose_norm_spans_two_ranks(dtype):
    """Two ranks of three heads each, one after the other on this GPU, against the whole in float64."""
    b, l, heads, headdim, d_state = 2, 517, 6, 64, 64
    channels = heads * headdim + 2 * d_state
    inputs = [
        torch.randn(b, l, heads * headdim + channels + heads).to(dtype), (torch.randn(channels, 4) * 0.4).to(dtype),
        (torch.randn(channels) * 0.1).to(dtype), torch.randn(heads) - 2, -torch.rand(heads) * 8 - 1, torch.randn(heads),
        torch.randn(heads * headdim).to(dtype),
    ]  # fmt: skip
    inputs = [t.cuda() for t in inputs]
    sizes = {"seq_idx": documents(b, l), "headdim": headdim, "groups": 1, "d_state": d_state}
    expected = with_gradients(lambda *t: mix_reference(*t, **sizes), [t.double() for t in inputs])
    poison()
    errors = [error(a, b) for a, b in zip(mix_over_ranks(inputs, sizes, 2), expected, strict=True)]
    assert all(e < 2 * TOLERANCE[dtype] for e in errors), errors


def test_gated_norm_that_spans_ranks_is_as_exact_as_on_one():
    """Although a row's sum of products is found from the rounded output."""
    from megatron_taipan.ops.gated_norm_triton import gated_rms_norm

    d = 3000  # 1500 a rank: blocks that are not full
    inputs = [torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((3, 33, d), (3, 33, d), (d,))]
    expected = with_gradients(partial(gated_rms_norm_reference, eps=1e-5, group_size=d), [t.double() for t in inputs])
    whole = with_gradients(partial(gated_rms_norm, eps=1e-5, group_size=d), inputs)
    poison()
    for a, b, c in zip(gated_norm_over_ranks(inputs, 2), whole, expected, strict=True):
        assert error(a, c) < 1.05 * error(b, c)


def test_the_fused_mixer_gives_the_same_bits_twice():
    from megatron_taipan.ops.mamba2_triton import mamba2_mix

    b, l, heads, headdim, d_state = 2, 517, 8, 64, 128
    channels = heads * headdim + 2 * d_state
    inputs = [
        torch.randn(b, l, heads * headdim + channels + heads).bfloat16(), torch.randn(channels, 4).bfloat16() * 0.4,
        torch.randn(channels).bfloat16() * 0.1, torch.randn(heads) - 2, -torch.rand(heads) * 8 - 1, torch.randn(heads),
        torch.randn(heads * headdim).bfloat16(),
    ]  # fmt: skip
    inputs = [t.cuda() for t in inputs]
    sizes = {"seq_idx": documents(b, l), "headdim": headdim, "groups": 1, "d_state": d_state}

    def run(*t: torch.Tensor) -> torch.Tensor:
        return mamba2_mix(*t, **sizes, group_size=heads * headdim, eps=1e-5)

    first = with_gradients(run, inputs)
    poison()
    assert all(torch.equal(a, b) for a, b in zip(first, with_gradients(run, inputs), strict=True))


@pytest.mark.parametrize("every", [0, 1, 16])
def test_the_copy_engine_changes_no_bit(monkeypatch, every):
    """Nor does it matter how states are kept: none, all, or one of so many and the others computed again."""
    assert_engine_changes_nothing(monkeypatch, "cuda", torch.bfloat16, 1152, heads=4, size=64, every=every)


@pytest.mark.parametrize("recompute", [["states"], ["conv"], ["conv", "states"]], ids="-".join)
@pytest.mark.parametrize(
    "dtype, b, l, heads, headdim, groups, d_state",
    [
        (torch.bfloat16, 2, 2560, 8, 64, 1, 128),  # the taipan presets' heads, three kept states a row
        (torch.bfloat16, 1, 2500, 8, 64, 1, 128),  # the last chunk short
        (torch.bfloat16, 1, 2051, 4, 64, 2, 64),  # the forward pass starts in the middle too
        (torch.float32, 1, 1100, 2, 16, 1, 16),
    ],
)
def test_what_is_computed_again_changes_no_bit(dtype, b, l, heads, headdim, groups, d_state, recompute):
    """Nor does the projection in the same operation; but in float32 cuBLAS may sum its gradient in another order."""
    inner = heads * headdim
    channels = inner + 2 * groups * d_state
    inputs = [
        torch.randn(b, l, inner + channels + heads).to(dtype), (torch.randn(channels, 4) * 0.4).to(dtype),
        (torch.randn(channels) * 0.1).to(dtype), torch.randn(heads) - 2, -torch.rand(heads) * 8 - 1, torch.randn(heads),
        torch.randn(inner).to(dtype), torch.randn(96, inner).to(dtype),
    ]  # fmt: skip
    inputs = [t.cuda() for t in inputs]
    sizes = {"seq_idx": documents(b, l), "headdim": headdim, "groups": groups, "d_state": d_state, "eps": 1e-5}
    expected = with_gradients(lambda *t: kept_and_projected(*t, group_size=inner // groups, **sizes), inputs)
    poison()
    got = with_gradients(
        lambda *t: mixed_again(*t, group_size=inner // groups, recompute=recompute, **sizes), inputs
    )  # fmt: skip
    *got, got_weight = got
    *expected, expected_weight = expected
    assert [torch.equal(a, b) for a, b in zip(got, expected, strict=True)] == [True] * 8
    if dtype == torch.float32:
        assert error(got_weight, expected_weight) < 1e-6
    else:
        assert torch.equal(got_weight, expected_weight)


def test_scan_in_pieces_is_the_scan_of_the_whole():
    from megatron_taipan.ops.ssd_triton import ssd

    b, l, h, p, n = 1, 700, 2, 64, 64
    x, B, C = (torch.randn(b, l, *s, device="cuda") for s in ((h, p), (1, n), (1, n)))
    dt, A, D = (
        torch.rand(b, l, h, device="cuda") * 0.1,
        -torch.rand(h, device="cuda") * 4,
        torch.randn(h, device="cuda"),
    )
    seq = documents(b, l)
    seq[:, 390:410] = seq[:, 390:391]  # the cut lies inside a document
    seq = seq.cummax(1).values
    whole, end = ssd_reference(*(t.double() for t in (x, dt, A, B, C)), chunk_size=64, D=D.double(), seq_idx=seq, return_state=True)  # fmt: skip
    poison()
    state, pieces = None, []
    for part in (slice(0, 400), slice(400, 401), slice(401, l)):
        y, state = ssd(
            x[:, part], dt[:, part], A, B[:, part], C[:, part], chunk_size=64, D=D, seq_idx=seq[:, part],
            initial_state=state, return_state=True,
        )  # fmt: skip
        pieces.append(y)
    assert error(torch.cat(pieces, 1), whole) < 2e-5
    assert error(state, end) < 2e-5


def test_convolution_continues_from_its_tail():
    from megatron_taipan.ops.causal_conv1d_triton import causal_conv1d

    x, weight, bias = (
        torch.randn(2, 300, 72, device="cuda"),
        torch.randn(72, 4, device="cuda"),
        torch.randn(72, device="cuda"),
    )
    seq = documents(2, 300)
    first, tail = causal_conv1d(x[:, :101], weight, bias, seq_idx=seq[:, :101], return_tail=True)
    keep = (seq[:, 100] == seq[:, 101])[:, None, None]  # a new document starts from zeros
    second = causal_conv1d(x[:, 101:], weight, bias, seq_idx=seq[:, 101:], initial_tail=tail * keep)
    expected = causal_conv1d_reference(x.double(), weight.double(), bias.double(), seq_idx=seq)
    assert error(torch.cat([first, second], 1), expected) < 1e-6
