"""The Mamba-2 kernels on a CPU, in the interpreter: TRITON_INTERPRET=1 pytest tests/ops/test_mamba2_interpreted.py.

Skipped otherwise: the variable has to be set before Triton is imported, and Triton is not among the CPU's packages.
float32 only, because the interpreter does not compute in bfloat16.
"""

import os

import pytest
import torch

from tests.ops.kernel_checks import error, with_gradients
from tests.ops.mamba2_reference import mix_reference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET is not 1"),
]
pytest.importorskip("triton")


@pytest.mark.parametrize(
    "b, l, heads, groups, packed",
    [
        (2, 133, 4, 2, True),  # two rows: each row has its own documents
        (1, 65, 3, 1, False),  # heads that cannot be split
    ],
)
def test_fused_mixer(b, l, heads, groups, packed):
    from megatron_taipan.ops.mamba2_triton import mamba2_mix

    torch.manual_seed(0)
    headdim = d_state = 16
    channels = heads * headdim + 2 * groups * d_state
    inputs = [
        torch.randn(b, l, heads * headdim + channels + heads), torch.randn(channels, 4) * 0.4,
        torch.randn(channels) * 0.1, torch.randn(heads) - 2, -torch.rand(heads) * 8 - 1, torch.randn(heads),
        torch.randn(heads * headdim),
    ]  # fmt: skip
    seq_idx = (torch.rand(b, l) < 0.03).cumsum(1).int() if packed else None
    sizes = {"seq_idx": seq_idx, "headdim": headdim, "groups": groups, "d_state": d_state}
    expected = with_gradients(lambda *t: mix_reference(*t, **sizes), [t.double() for t in inputs])
    got = with_gradients(lambda *t: mamba2_mix(*t, **sizes, group_size=heads * headdim // groups, eps=1e-5), inputs)
    errors = [error(a, b) for a, b in zip(got, expected, strict=True)]
    assert all(e < 4e-5 for e in errors), errors
