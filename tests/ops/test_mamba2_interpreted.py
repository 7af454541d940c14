"""The Mamba-2 kernels on a CPU, in the interpreter: TRITON_INTERPRET=1 pytest tests/ops/test_mamba2_interpreted.py.

Skipped otherwise: the variable has to be set before Triton is imported, and Triton is not among the CPU's packages.
float32 only, because the interpreter does not compute in bfloat16.
"""

from functools import partial

import pytest
import torch

from megatron_taipan.ops.norms import gated_rms_norm_reference
from tests.ops.copy_engine import assert_engine_changes_nothing
from tests.ops.devices import interpreted_only
from tests.ops.kernel_checks import error, with_gradients
from tests.ops.mamba2_reference import kept_and_projected, mix_reference, mixed_again
from tests.ops.pieces import mix_in_pieces
from tests.ops.spread import gated_norm_over_ranks, mix_over_ranks

pytestmark = [
    pytest.mark.slow,
    interpreted_only,
]
pytest.importorskip("triton")


def random_case(b: int, l: int, heads: int, size: int, groups: int, packed: bool) -> tuple[list, dict]:
    """Arguments of the mixer, heads and states of that size: tensors, and options."""
    torch.manual_seed(0)
    channels = heads * size + 2 * groups * size
    inputs = [
        torch.randn(b, l, heads * size + channels + heads), torch.randn(channels, 4) * 0.4,
        torch.randn(channels) * 0.1, torch.randn(heads) - 2, -torch.rand(heads) * 8 - 1, torch.randn(heads),
        torch.randn(heads * size),
    ]  # fmt: skip
    seq_idx = (torch.rand(b, l) < 0.03).cumsum(1).int() if packed else None
    return inputs, {"seq_idx": seq_idx, "headdim": size, "groups": groups, "d_state": size}


@pytest.mark.parametrize(
    "b, l, heads, groups, packed",
    [
        (2, 133, 4, 2, True),  # two rows: each row has its own documents
        (1, 65, 3, 1, False),  # heads that cannot be split
        (2, 192, 4, 2, True),  # rows of whole chunks: tiles by the copy engine
        (1, 128, 3, 1, False),
        (2, 80, 2, 1, False),  # not of whole chunks: a tile by the copy engine would have the next row's tokens
    ],
)
def test_fused_mixer(b, l, heads, groups, packed):
    from megatron_taipan.ops.mamba2_triton import mamba2_mix

    inputs, sizes = random_case(b, l, heads, 16, groups, packed)
    headdim = sizes["headdim"]
    expected = with_gradients(lambda *t: mix_reference(*t, **sizes), [t.double() for t in inputs])
    got = with_gradients(lambda *t: mamba2_mix(*t, **sizes, group_size=heads * headdim // groups, eps=1e-5), inputs)
    errors = [error(a, b) for a, b in zip(got, expected, strict=True)]
    assert all(e < 4e-5 for e in errors), errors


def test_what_is_computed_again_changes_no_bit(monkeypatch):
    """Three kept states a row, the last chunk short; and the projection in the same operation."""
    from megatron_taipan.ops import mamba2_triton

    monkeypatch.setattr(mamba2_triton, "STATES_EVERY", 2)
    inputs, sizes = random_case(1, 4 * 64 + 7, 2, 16, 1, True)
    inputs, options = [*inputs, torch.randn(24, 32)], {**sizes, "group_size": 32, "eps": 1e-5}
    expected = with_gradients(lambda *t: kept_and_projected(*t, **options), inputs)
    for recompute in ((), ("states", "conv")):
        got = with_gradients(partial(mixed_again, recompute=recompute, **options), inputs)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), recompute


@pytest.mark.parametrize("every", [0, 1, 2])
def test_the_copy_engine_changes_no_bit(monkeypatch, every):
    assert_engine_changes_nothing(monkeypatch, "cpu", torch.float32, 192, heads=2, size=16, every=every)


def test_what_the_copy_engine_may_move():
    """Where the interpreter would read right numbers from any layout, the GPU's engine has rules."""
    from megatron_taipan.ops.ssd_tiles import tiled

    numbers = torch.zeros(1 << 14)
    allowed = numbers.as_strided((2, 64, 2, 16), (64 * 48, 48, 16, 1))
    assert tiled(allowed)
    for refused in (
        numbers.as_strided((2, 80, 2, 16), (80 * 48, 48, 16, 1)),  # a part of a chunk
        numbers.as_strided((2, 64, 2, 16), (64 * 48, 48, 16, 1), 1),  # no multiple of 16 bytes
        numbers.as_strided((2, 64, 2, 16), (64 * 50, 50, 16, 1)),  # nor the step from token to token
        numbers.as_strided((2, 64, 2, 16), (64 * 16, 16, 16, 1)),  # tokens share memory
        numbers.as_strided((2, 64, 2, 16), (65 * 48, 48, 16, 1)),  # a gap between rows
        numbers.as_strided((2, 64, 2, 16), (64 * 48, 48, 24, 1)),  # and between heads
    ):
        assert not tiled(allowed, refused), refused.stride()


def test_fused_mixer_whose_norm_spans_two_ranks():
    """Output and gradients against one rank's reference; both ranks add to the gradients of B and C."""
    inputs, sizes = random_case(1, 67, 4, 16, 1, True)
    expected = with_gradients(lambda *t: mix_reference(*t, **sizes), [t.double() for t in inputs])
    errors = [error(a, b) for a, b in zip(mix_over_ranks(inputs, sizes, 2), expected, strict=True)]
    assert all(e < 4e-5 for e in errors), errors


@pytest.mark.parametrize(
    "ends, starts",
    [
        ([67, 133], None),  # one document
        ([64, 128], [[64], [66]]),  # documents that begin on and after a border; pieces of whole chunks
        ([40, 43, 83], [[39], [10, 42]]),  # before one; a piece as short as the convolution's tail, passed through
        ([40, 70, 110], [[71], []]),
    ],
)
def test_fused_mixer_in_pieces(ends, starts):
    """Output and every gradient against whole rows; steps so small that states reach over several pieces."""
    inputs, sizes = random_case(2, ends[-1], 3, 16, 1, False)
    inputs[3] -= 3
    if starts is not None:
        seq_idx = torch.zeros(2, ends[-1], dtype=torch.int32)
        for row, begins in enumerate(starts):
            seq_idx[row, begins] = 1
        sizes["seq_idx"] = seq_idx.cumsum(1).int()
    expected = with_gradients(lambda *t: mix_reference(*t, **sizes), [t.double() for t in inputs])
    got = with_gradients(lambda *t: mix_in_pieces(t, sizes, ends, group_size=48, eps=1e-5), inputs)
    errors = [error(a, b) for a, b in zip(got, expected, strict=True)]
    assert all(e < 4e-5 for e in errors), errors


@pytest.mark.parametrize("ends", [[263], [130, 263]], ids=str)
def test_fused_mixer_cut_in_segments(monkeypatch, ends):
    """Of two chunks each, the last one short; kept states that begin no segment; states that reach over several
    segments, and documents that begin in a segment's first or second chunk, or with one. Whole rows and two pieces."""
    from megatron_taipan.ops import mamba2_triton, ssd_backward_triton, ssd_forward_triton

    for module in (ssd_forward_triton, ssd_backward_triton):
        monkeypatch.setattr(module, "segments", lambda b, heads, n_chunks: (-(-n_chunks // 2), 2))
    monkeypatch.setattr(mamba2_triton, "STATES_EVERY", 3)
    inputs, sizes = random_case(2, ends[-1], 2, 16, 1, False)
    inputs[3] -= 4
    seq_idx = torch.zeros(2, ends[-1], dtype=torch.int32)
    seq_idx[1, [30, 128, 200]] = 1
    sizes["seq_idx"] = seq_idx.cumsum(1).int()
    expected = with_gradients(lambda *t: mix_reference(*t, **sizes), [t.double() for t in inputs])
    options = {"group_size": 32, "eps": 1e-5, "recompute": ("states",)}
    if len(ends) == 1:
        got = with_gradients(lambda *t: mamba2_triton.mamba2_mix(*t, **sizes, **options), inputs)
    else:
        got = with_gradients(lambda *t: mix_in_pieces(t, sizes, ends, **options), inputs)
    errors = [error(a, b) for a, b in zip(got, expected, strict=True)]
    assert all(e < 4e-5 for e in errors), errors


def test_gated_norm_that_spans_three_ranks():
    torch.manual_seed(0)
    inputs = [torch.randn(2, 5, 72), torch.randn(2, 5, 72), torch.randn(72)]
    expected = with_gradients(partial(gated_rms_norm_reference, eps=1e-5, group_size=72), [t.double() for t in inputs])
    errors = [error(a, b) for a, b in zip(gated_norm_over_ranks(inputs, 3), expected, strict=True)]
    assert all(e < 1e-6 for e in errors), errors
