"""A tokenizer.json of Hugging Face's tokenizers library."""

import os
from functools import cached_property
from pathlib import Path

from megatron_taipan.errors import UserError
from megatron_taipan.tokenizer.base import Encoded, Tokenizer, file_digest, flatten
from megatron_taipan.tokenizer.files import what_it_is
from megatron_taipan.tokenizer.token_bytes import bytes_by_ends


class HFTokenizer(Tokenizer):
    """A tokenizer.json, run by the `tokenizers` library."""

    def __init__(self, path: str, allow_special: bool = False):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers of data_prep are the parallelism
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(f"{path}: the package tokenizers is missing; `pip install tokenizers`") from error
        try:
            # from_file takes every name as UTF-8, whatever the locale
            self.model = tokenizers.Tokenizer.from_buffer(Path(path).read_bytes())
        except Exception as error:  # the library raises bare Exception
            reason = what_it_is(path) or ": " + " ".join(str(error).split())
            raise UserError(f"{path} is not a tokenizer.json{reason}") from error
        self.model.no_truncation()  # the file may ask for either
        self.model.no_padding()
        self.model.encode_special_tokens = not allow_special
        self.library = f"tokenizers {tokenizers.__version__}"
        self.vocab_size = max(self.model.get_vocab(with_added_tokens=True).values()) + 1
        self.special = {i: t.content for i, t in self.model.get_added_tokens_decoder().items() if t.special}
        self._find_roles(path, self.special)
        self.digest = file_digest(path)

    def encode_batch(self, texts: list[str]) -> Encoded:
        return flatten([e.ids for e in self.model.encode_batch_fast(texts, add_special_tokens=False)])

    def token_id(self, token: str) -> int | None:
        return self.model.token_to_id(token)

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        text = self.model.decode(ids, skip_special_tokens=skip_special_tokens)
        return text.removeprefix(self._added) if skip_special_tokens else text

    @cached_property
    def _added(self) -> str:
        """What an exported sentencepiece model puts before a text, and leaves there in decoding."""
        return " " if self.model.decode(self.encode("a")) == " a" else ""

    def encode_with_bytes(self, text: str) -> tuple[list[int], list[bytes]]:
        encoding = self.model.encode(text, add_special_tokens=False)
        places = encoding.offsets  # (first, behind the last) in characters; tokens that share one all have its place
        following = [*(first for first, _ in places[1:]), len(text)]
        ends = [min(end, first) for (_, end), first in zip(places, following, strict=False)]  # one too many if empty
        at = [0]  # byte at which each character begins
        for character in text:
            at.append(at[-1] + len(character.encode()))
        return encoding.ids, bytes_by_ends(text.encode(), [at[end] for end in ends], encoding.tokens)
