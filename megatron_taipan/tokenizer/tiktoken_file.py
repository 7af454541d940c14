"""tiktoken: an encoding by name (`tiktoken:gpt2`), or a file of base64 tokens and ranks as Llama-3's tokenizer.model.

Such a file says neither how text is cut into pieces before bytes are joined nor which special tokens there are. Both
are Llama-3's here (`pat_str` and the first of `special_tokens` in llama_models' tokenizer.py).
"""

import base64
from hashlib import sha256
from pathlib import Path

import numpy as np

from megatron_taipan.errors import UserError
from megatron_taipan.tokenizer.base import Encoded, Tokenizer, file_digest, flatten

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>")  # their ids follow the ranks
NAMED = "tiktoken:"


class TiktokenTokenizer(Tokenizer):
    """An encoding of tiktoken, by name or from a file."""

    def __init__(self, name: str, allow_special: bool = False):
        try:
            import tiktoken
        except ImportError as error:
            raise UserError(f"{name}: the package tiktoken is missing; `pip install tiktoken`") from error
        self.library = f"tiktoken {tiktoken.__version__}"
        self.allow_special = allow_special
        path = None if name.startswith(NAMED) else name
        if path is None:
            try:
                self.model = tiktoken.get_encoding(name.removeprefix(NAMED))
            except Exception as error:
                raise UserError(f"{name}: {' '.join(str(error).split())}") from error
            special = {token: self.model.encode_single_token(token) for token in self.model.special_tokens_set}
            self.digest = sha256(repr(sorted(self.model._mergeable_ranks.items())).encode()).hexdigest()
        else:
            ranks = read_ranks(path)
            special = {token: len(ranks) + i for i, token in enumerate(LLAMA3_SPECIAL)}
            self.model = tiktoken.Encoding(
                Path(path).name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special
            )
            self.digest = file_digest(path)
        self.vocab_size = self.model.max_token_value + 1
        self.special_ids = special
        self.special = {i: token for token, i in sorted(special.items(), key=lambda item: item[1])}
        self._find_roles(path, self.special)

    def encode_batch(self, texts: list[str]) -> Encoded:
        if self.allow_special:
            return flatten([self.model.encode(text, allowed_special="all") for text in texts])
        found = [self.model.encode_to_numpy(text, disallowed_special=()) for text in texts]
        return np.concatenate(found), np.array([len(ids) for ids in found], np.int64)

    def token_id(self, token: str) -> int | None:
        return self.special_ids.get(token)

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        if skip_special_tokens:
            ids = [i for i in ids if i < self.vocab_size and i not in self.special]
        return self.model.decode(ids)

    def encode_with_bytes(self, text: str) -> tuple[list[int], list[bytes]]:
        ids = self.encode(text)
        return ids, [self.model.decode_single_token_bytes(i) for i in ids]


def is_tiktoken(path: str | Path) -> bool:
    """Whether the first line of a file is a base64 token and a rank."""
    with open(path, "rb") as file:
        parts = file.readline(200).split()
    try:
        return len(parts) == 2 and parts[1].isdigit() and bool(base64.b64decode(parts[0], validate=True))
    except ValueError:
        return False


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Tokens and their ranks, which are their ids. Empty lines count for nothing, as for tiktoken's own reader; what
    is not base64 is refused, where that one takes it for another token.

    Raises:
        UserError: a line is something else, or the ranks are not 0 to their number - 1, so that those of the special
            tokens, which follow, would be taken.
    """
    ranks = {}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise UserError(f"{path} line {number} is not a base64 token and a rank") from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(
            f"{path} has {len(ranks)} different tokens, and their ranks are not 0 to {len(ranks) - 1}, each once: it is"
            " damaged, or another tokenizer's than Llama-3's, whose files leave no rank out"
        )
    return ranks
