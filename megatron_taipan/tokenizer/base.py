"""One interface to the tokenizer libraries: texts in, ids out, and back.

Text is text: the spelling of a special token in a document never becomes its id unless `allow_special` says so, and no
tokenizer adds BOS or EOS by itself; whoever needs them adds them, in one place.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np

from megatron_taipan.tokenizer.special_tokens import USUAL_SPELLINGS, Role, find_role

Encoded = tuple[np.ndarray, np.ndarray]  # ids uint32 [n], counts int64 [texts]


class Tokenizer(ABC):
    """A loaded tokenizer.

    Attributes:
        library: name and version of the library that does the work.
        vocab_size: largest id + 1.
        digest: hash of the tokenizer's file.
        special: spelling of the special tokens that text may turn into, by id.
        roles: by kind (`bos_token`, `eos_token`, `pad_token`, `unk_token`) the token that plays it, with who says so,
            or why there is none.
        end_ids: ids that end a document: the EOS, or all that may be it where nothing says which it is.
    """

    library: str
    vocab_size: int
    digest: str
    special: dict[int, str] = {}
    roles: dict[str, Role]
    end_ids: tuple[int, ...]

    @abstractmethod
    def encode_batch(self, texts: list[str]) -> Encoded:
        """Ids of each text, nothing added."""

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of a token by its spelling."""

    @abstractmethod
    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        """The text of ids.

        Args:
            skip_special_tokens: False: special tokens are visible, and ids must be below `vocab_size`. True: the text
                as it was encoded; special tokens are left out, and so are ids that the tokenizer does not have (a
                model's vocabulary may be padded).
        """

    @abstractmethod
    def encode_with_bytes(self, text: str) -> tuple[list[int], list[bytes]]:
        """The ids of a text, and for each the bytes of the text that it stands for (see token_bytes.py)."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text, nothing added."""
        return self.encode_batch([text])[0].tolist()

    @property
    def eod(self) -> int | None:
        """The id that ends a document; None where there is none, or several of which nothing says which it is."""
        return self.roles["eos_token"].id

    @property
    def bos(self) -> int | None:
        """The id that begins a document; None as for `eod`."""
        return self.roles["bos_token"].id

    def _find_roles(
        self, path: str | None, special: dict[int, str], own: dict[str, str] | None = None, unknown: int = -1
    ) -> None:
        """Sets `roles` and `end_ids`.

        Args:
            path: the tokenizer's file, beside which configurations may lie.
            special: spelling of the tokens that the tokenizer marks as special, by id.
            own: spellings that the tokenizer's file itself gives to roles, by kind.
            unknown: id of the token for text that has no other, where that is not among the special ones.
        """
        own, beside = own or {}, Path(path) if path else None
        unk = special if unknown < 0 else {unknown: own["unk_token"]}
        self.roles = {
            kind: find_role(kind, beside, self.token_id, unk if kind == "unk_token" else special, own.get(kind))
            for kind in USUAL_SPELLINGS
        }
        self.end_ids = tuple(self.roles["eos_token"].candidates)


def flatten(lists: list[list[int]]) -> Encoded:
    """Joins lists of ids."""
    counts = np.array([len(ids) for ids in lists], np.int64)
    flat = np.empty(int(counts.sum()), np.uint32)
    at = 0
    for ids in lists:
        flat[at : at + len(ids)] = ids
        at += len(ids)
    return flat, counts


def file_digest(path: str) -> str:
    """sha256 of a file."""
    return sha256(Path(path).read_bytes()).hexdigest()


def decode_with_special(ids: list[int], decode: Callable[[list[int]], str], special: dict[int, str]) -> str:
    """Decodes the runs between special ids and puts the special tokens' names between them."""
    out = ""
    run: list[int] = []
    for token in ids:
        if token in special:
            out += (decode(run) if run else "") + special[token]
            run = []
        else:
            run.append(token)
    return out + (decode(run) if run else "")
