"""A tokenizer by its name or file, whatever its form."""

from pathlib import Path

from megatron_taipan.errors import UserError
from megatron_taipan.tokenizer.base import Tokenizer
from megatron_taipan.tokenizer.files import tokenizer_file
from megatron_taipan.tokenizer.hf_tokenizer import HFTokenizer
from megatron_taipan.tokenizer.sentencepiece_model import SentencePieceTokenizer
from megatron_taipan.tokenizer.tiktoken_file import NAMED, TiktokenTokenizer, is_tiktoken


def load_tokenizer(name: str, allow_special: bool = False) -> Tokenizer:
    """The reference tokenizer of a file, a folder, `tiktoken:NAME`, or a Hugging Face hub name.

    A file that ends in .json is a tokenizer.json; the content of others says which of the other two it is.

    Args:
        allow_special: text that spells a special token becomes its id.

    Raises:
        UserError: it does not exist or is of no known form.
    """
    if name.startswith(NAMED):
        return TiktokenTokenizer(name, allow_special)
    path = tokenizer_file(name)
    if path.endswith(".json"):
        return HFTokenizer(path, allow_special)
    if is_tiktoken(path):
        return TiktokenTokenizer(path, allow_special)
    return SentencePieceTokenizer(path, allow_special)


def load_tokenizer_file(path: str | Path) -> Tokenizer:
    """As `load_tokenizer`, of a file alone: a name that is mistyped is not looked for on the hub.

    Raises:
        UserError: it does not exist or is of no known form.
    """
    if not Path(path).is_file():
        raise UserError(f"the tokenizer file {path} does not exist")
    return load_tokenizer(str(path))
