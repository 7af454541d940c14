"""The fused Mamba-2 layer over pieces of its rows, on CPUs, in Triton's interpreter.

Run and skipped as tests/ops/test_mamba2_interpreted.py.
"""

import pytest

from tests.distributed.launch import launch, same_packages
from tests.model.piece_mixer import Setting, compare_pieces
from tests.ops.devices import interpreted_only

pytestmark = [
    pytest.mark.slow,
    interpreted_only,
]
pytest.importorskip("triton")


@pytest.mark.parametrize(
    ("pieces", "setting"),
    [
        (2, Setting(1, 67, [0, 1, 2, 3, 4])),
        (3, Setting(1, 64, [0, 4])),  # a piece ends where a chunk does
        (2, Setting(1, 133, [3], segmented=True)),
        (2, Setting(2, 67, [3])),  # the norm's group is on two tensor ranks
        (2, Setting(1, 67, [3], recompute="selective")),
        (2, Setting(1, 67, [3], recompute="full")),
    ],
)
def test_pieces_are_the_whole_layer(pieces, setting):
    """Outputs and all gradients; sent is what the layer sends op by op."""
    env = same_packages() | {"OMP_NUM_THREADS": "1"}
    for results in launch(pieces * setting.tensor, compare_pieces, setting, timeout=900, env=env):
        assert len(results) == len(setting.cases)
        for fused, plain, alone, sent, sent_plain in results:
            assert len(fused) == 18
            for errors in (fused, plain, alone):
                assert all(e < 4e-5 for e in errors.values()), errors
            assert sent == sent_plain or setting.recompute != "none"
