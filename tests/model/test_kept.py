"""What layers of taipan_1.3b keep for their backward pass, as docs/lab-notes.md has it: one tensor more is noticed."""

import argparse

import pytest

from benchmarks.common import preset
from benchmarks.kept import kept_by_layers
from megatron_taipan.engine.operations import choose_operations
from tests.ops.no_triton import unlaunched_ops

ROWS, LENGTH = 3, 4160  # 65 chunks of the scan; no matrix has a multiple of so many elements
TOKENS = ROWS * LENGTH

# bytes a token
STREAM, HALF = 4 * 2048, 2 * 2048  # the residual stream in float32; anything of its width in bf16
PROJECTED, CONVOLVED, Y = 2 * 8512, 2 * 4352, 2 * 4096
STATES = 2 * 64 * 64 * 128 // 64  # of 64 heads at every 64th token, in bf16
FEW_STATES = 2 * STATES * 5 // 65  # every 16th of 65 in float32
FF = 2 * 5632
LSE = 4 * 16

SELECTED = 2 * [STREAM, FF] + 6 * [HALF] + [LSE]  # u, k, v, q, its attention, what refines the stream


def kept(*overrides: str) -> list[list[int]]:
    """Of the first group's seven layers, six Mamba-2 layers and a selective one: all that is above 60 bytes a token."""
    overrides = (f"data.seq_len={LENGTH}", *overrides)
    config = preset(argparse.Namespace(preset="taipan_1.3b", batch=ROWS, ops="fast", overrides=overrides))
    config.model.pattern = "M*6 S"
    with unlaunched_ops(config.parallel.recompute_mixer) as ops:
        layers = kept_by_layers(config, ops, "meta")
    assert "".join(letter for letter, _ in layers) == "MMMMMMS"
    weights = 2 * 8512 * 2048  # joined on the meta device; a view of the parameters where they adjoin, as in training
    return [
        sorted(one.bytes // TOKENS for one in found if one.bytes // TOKENS >= 60 and one.bytes != weights)
        for _, found in layers
    ]


@pytest.mark.parametrize(
    ("again", "mixer"),
    [
        ("[]", [PROJECTED, CONVOLVED, Y, STATES]),
        ("[states]", [PROJECTED, CONVOLVED, Y, FEW_STATES]),
        ("[states, conv]", [PROJECTED, Y, FEW_STATES]),
    ],
)
def test_mamba_layers_keep_no_input_of_a_product_and_every_second_one_half_a_stream(again, mixer):
    first, second, *others, _ = kept(f"parallel.recompute_mixer={again}")
    assert first == sorted([*mixer, STREAM]) and second == sorted([*mixer, HALF])
    assert others == [first, second, first, second]


@pytest.mark.parametrize("overrides", [["model.gate={}"], []], ids=["the paper's gate", "the presets'"])
def test_selective_layers_keep_neither_swiglus_product_nor_the_gates_wide_input(overrides):
    assert kept(*overrides)[-1] == sorted(SELECTED)


@pytest.mark.gpu
def test_a_gpu_keeps_what_is_known_without_one():
    config = preset(argparse.Namespace(preset="taipan_1.3b", batch=1, ops="fast", overrides=["data.seq_len=1088"]))
    config.model.pattern = "M*2 S"
    with unlaunched_ops(config.parallel.recompute_mixer) as ops:
        expected = kept_by_layers(config, ops, "meta")
    found = kept_by_layers(config, choose_operations(config), "cuda")
    for (_, here), (_, there) in zip(expected, found, strict=True):
        assert sorted(one.bytes for one in here) == sorted(one.bytes for one in there)
