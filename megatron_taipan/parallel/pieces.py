"""Which rows a network can share out over ranks."""

from megatron_taipan.errors import UserError
from megatron_taipan.layer_kinds.registry import kinds_of
from megatron_taipan.model_config import ModelConfig


def refuse_unfit_pieces(network: ModelConfig, length: int, pieces: int, *, rows: str, ranks: str) -> None:
    """Whether the network takes rows of `length` tokens in so many pieces.

    Args:
        rows, ranks: what the user calls the two, such as data.seq_len and parallel.context.

    Raises:
        UserError: it does not, with the arithmetic.
    """
    piece, left = divmod(length, pieces)
    if left:
        raise UserError(
            f"{rows}={length} is not a multiple of {ranks}={pieces} (remainder {left});"
            f" take {max(piece, 1) * pieces} or another number of pieces"
        )
    if whole := [kind.name for kind in kinds_of(network.letters) if kind.pieces is None]:
        raise UserError(f"{ranks}={pieces}: {', '.join(whole)}s need whole rows; take {ranks}=1")
    tail = network.mamba.d_conv - 1
    if "M" in network.letters and piece < tail:
        raise UserError(
            f"a piece of {rows}={length} / {ranks}={pieces} = {piece} tokens is shorter"
            f" than the {tail} inputs that the convolution of a Mamba-2 layer keeps; take longer rows or fewer pieces"
        )
