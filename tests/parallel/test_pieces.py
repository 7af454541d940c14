"""Which rows can be cut into pieces; that the shortest give a whole row's numbers, tests/model/test_pieces.py shows."""

import pytest

from megatron_taipan.errors import UserError
from megatron_taipan.parallel.pieces import refuse_unfit_pieces
from tests.inference.networks import small_config

NAMES = {"rows": "rows", "ranks": "ranks"}


@pytest.mark.parametrize("d_conv", [2, 4])
def test_a_piece_holds_at_least_the_inputs_that_the_convolution_looks_back_to(d_conv):
    with_mamba, without = small_config("M W", mamba={"d_conv": d_conv, "headdim": 8}), small_config("W A")
    refuse_unfit_pieces(with_mamba, 4 * (d_conv - 1), 4, **NAMES)
    refuse_unfit_pieces(without, 4, 4, **NAMES)
    if d_conv > 2:
        with pytest.raises(UserError, match=f"= {d_conv - 2} tokens is shorter than the {d_conv - 1} inputs"):
            refuse_unfit_pieces(with_mamba, 4 * (d_conv - 2), 4, **NAMES)
