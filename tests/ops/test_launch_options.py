"""Stages of the group kernel for what a GPU has: the compiler's own counts are from `experiments.kernel_registers`."""

import pytest
import torch

pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("shared", "p", "n", "stages", "engine"),
    [
        (232_448, 64, 128, 4, True),  # H100, H200: 172,088 bytes
        (232_448, 128, 64, 4, True),  # 221,240
        (232_448, 128, 128, 3, True),  # 229,408; four would be 327,736
        (166_912, 64, 128, 3, False),  # A100: 122,880
        (101_376, 64, 128, 2, True),  # GPUs for desktops: 73,752
        (101_376, 16, 16, 4, True),  # 19,512
    ],
)
def test_stages_fit_into_shared_memory(shared, p, n, stages, engine):
    from megatron_taipan.ops.ssd_forward_triton import launch_options

    options = launch_options("group", torch.bfloat16, engine, p, n, shared)
    assert options == {"num_warps": 8, "num_stages": stages, "STAGES": stages}
