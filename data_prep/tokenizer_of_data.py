"""The tokenizer to look at data with: the one that the data was made with, as far as can be known."""

from megatron_taipan.data.made_with import tokenizer_of
from megatron_taipan.errors import UserError
from megatron_taipan.tokenizer.base import Tokenizer
from megatron_taipan.tokenizer.load import load_tokenizer


def tokenizer_of_data(name: str, prefix: str) -> Tokenizer:
    """The tokenizer of `name`.

    Raises:
        UserError: as `load_tokenizer`; or the data's manifest says that it was made with another.
    """
    tokenizer, recorded = load_tokenizer(name), tokenizer_of(prefix)
    if recorded and recorded["sha256"] != tokenizer.digest:
        raise UserError(f"{name} is not the tokenizer that {prefix} was made with ({recorded['name']})")
    return tokenizer


def refuse_other_data(largest: int, tokenizer: Tokenizer, where: str = "") -> None:
    """Raises UserError if the largest id of some data is beyond the tokenizer's vocabulary."""
    if largest >= tokenizer.vocab_size:
        raise UserError(
            f"{where}id {largest} is beyond this tokenizer's vocabulary of {tokenizer.vocab_size}; the data was made"
            " with another tokenizer"
        )
