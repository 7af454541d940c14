"""Tokenizer libraries behind one face: texts in, one flat array of ids and the number of ids of each text out.

Text is text: the spelling of a special token in a document never becomes its id unless `allow_special` says so, and no
tokenizer adds BOS or EOD by itself; the pipeline does, in one place.
"""

import base64
import os
from abc import ABC, abstractmethod
from hashlib import sha256
from pathlib import Path

import numpy as np

from data_prep.tokenizer_files import EXPECTED, tokenizer_file, what_it_is
from megatron_taipan.data.made_with import tokenizer_of
from megatron_taipan.data.special_tokens import Role, find_role
from megatron_taipan.errors import UserError

Encoded = tuple[np.ndarray, np.ndarray]  # ids uint32 [n], counts int64 [texts]
KINDS = {"eod": "eos_token", "bos": "bos_token"}  # our roles by transformers' names


class Tokenizer(ABC):
    """A loaded tokenizer.

    Attributes:
        library: name and version of the library that does the work.
        vocab_size: largest id + 1.
        eod, bos: ids, or None where the tokenizer has none, or several of which nothing says which it is.
        roles: the same, with who says so, or why there is none.
        digest: hash of the tokenizer's file.
        special: spelling of the special tokens that text may turn into, by id.
    """

    library: str
    vocab_size: int
    eod: int | None
    bos: int | None
    digest: str
    roles: dict[str, Role] = {}
    special: dict[int, str] = {}

    @abstractmethod
    def encode(self, texts: list[str]) -> Encoded:
        """Ids of each text, nothing added."""

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of a token by its spelling."""

    @abstractmethod
    def decode(self, ids: list[int]) -> str:
        """Text with special tokens visible."""

    def _find_roles(self, path: str | None, special: dict[int, str], own: dict[str, str] | None = None) -> None:
        """Sets `roles`, `eod` and `bos`; `own`: spellings that the tokenizer's file itself gives them, by role."""
        beside = Path(path) if path else None
        own = own or {}
        self.roles = {r: find_role(kind, beside, self.token_id, special, own.get(r)) for r, kind in KINDS.items()}
        self.eod, self.bos = self.roles["eod"].id, self.roles["bos"].id


def flatten(lists: list[list[int]]) -> Encoded:
    """Joins lists of ids."""
    counts = np.array([len(ids) for ids in lists], np.int64)
    flat = np.empty(int(counts.sum()), np.uint32)
    at = 0
    for ids in lists:
        flat[at : at + len(ids)] = ids
        at += len(ids)
    return flat, counts


class SentencePiece(Tokenizer):
    """A sentencepiece .model file."""

    def __init__(self, path: str, allow_special: bool = False):
        try:
            import sentencepiece
        except ImportError as error:
            raise UserError(f"{path}: the package sentencepiece is missing; `pip install sentencepiece`") from error
        if allow_special:
            raise UserError(
                "--allow-special is not possible with sentencepiece: it never reads control tokens from text"
            )
        self.model = sentencepiece.SentencePieceProcessor()
        try:
            self.model.Load(path)
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} is no sentencepiece model: {reason}; give {EXPECTED}") from error
        self.library = f"sentencepiece {sentencepiece.__version__}"
        self.vocab_size = self.model.vocab_size()
        control = {i: self.model.id_to_piece(i) for i in range(self.vocab_size) if self.model.is_control(i)}
        ends = {"eod": self.model.eos_id(), "bos": self.model.bos_id()}  # -1: there is none
        self._find_roles(path, control, {role: control[i] for role, i in ends.items() if i in control})
        self.digest = file_digest(path)

    def encode(self, texts: list[str]) -> Encoded:
        return flatten(self.model.encode(texts, num_threads=1))

    def token_id(self, token: str) -> int | None:
        found = self.model.piece_to_id(token)
        return found if self.model.id_to_piece(found) == token else None

    def decode(self, ids: list[int]) -> str:
        return with_special(
            ids, self.model.decode, {i: self.model.id_to_piece(i) for i in set(ids) if self.model.is_control(i)}
        )


class HuggingFace(Tokenizer):
    """A tokenizer.json, run by the `tokenizers` library."""

    def __init__(self, path: str, allow_special: bool = False):
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
        try:
            import tokenizers
        except ImportError as error:
            raise UserError(f"{path}: the package tokenizers is missing; `pip install tokenizers`") from error
        try:
            self.model = tokenizers.Tokenizer.from_file(path)
        except Exception as error:  # the library raises bare Exception
            reason = what_it_is(path) or ": " + " ".join(str(error).split())
            raise UserError(f"{path} is no tokenizer.json{reason}") from error
        self.model.no_truncation()
        self.model.no_padding()
        self.model.encode_special_tokens = not allow_special
        self.library = f"tokenizers {tokenizers.__version__}"
        self.vocab_size = max(self.model.get_vocab(with_added_tokens=True).values()) + 1
        self.special = {i: t.content for i, t in self.model.get_added_tokens_decoder().items() if t.special}
        self._find_roles(path, self.special)
        self.digest = file_digest(path)

    def encode(self, texts: list[str]) -> Encoded:
        return flatten([e.ids for e in self.model.encode_batch_fast(texts, add_special_tokens=False)])

    def token_id(self, token: str) -> int | None:
        return self.model.token_to_id(token)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids, skip_special_tokens=False)


class TikToken(Tokenizer):
    """tiktoken: an encoding by name (`tiktoken:gpt2`), or a file of base64 tokens and ranks (Llama-3's form)."""

    LLAMA3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )

    def __init__(self, name: str, allow_special: bool = False):
        try:
            import tiktoken
        except ImportError as error:
            raise UserError(f"{name}: the package tiktoken is missing; `pip install tiktoken`") from error
        self.library = f"tiktoken {tiktoken.__version__}"
        self.allow_special = allow_special
        if name.startswith("tiktoken:"):
            try:
                self.model = tiktoken.get_encoding(name.removeprefix("tiktoken:"))
            except Exception as error:
                raise UserError(f"{name}: {' '.join(str(error).split())}") from error
            self.digest = sha256(repr(sorted(self.model._mergeable_ranks.items())).encode()).hexdigest()
        else:
            ranks = tiktoken_ranks(name)
            special = {token: len(ranks) + i for i, token in enumerate(("<|begin_of_text|>", "<|end_of_text|>"))}
            self.model = tiktoken.Encoding(
                Path(name).name, pat_str=self.LLAMA3, mergeable_ranks=ranks, special_tokens=special
            )
            self.digest = file_digest(name)
        self.vocab_size = self.model.max_token_value + 1
        self.special = {i: token for token, i in self.model._special_tokens.items()}
        self._find_roles(None if name.startswith("tiktoken:") else name, self.special)

    def encode(self, texts: list[str]) -> Encoded:
        if self.allow_special:
            return flatten([self.model.encode(text, allowed_special="all") for text in texts])
        found = [self.model.encode_to_numpy(text, disallowed_special=()) for text in texts]
        return np.concatenate(found), np.array([len(ids) for ids in found], np.int64)

    def token_id(self, token: str) -> int | None:
        return self.model._special_tokens.get(token)

    def decode(self, ids: list[int]) -> str:
        return self.model.decode(ids)


def refuse_other_data(largest: int, tokenizer: Tokenizer, where: str = "") -> None:
    """Raises UserError if the largest id of some data is beyond the tokenizer's vocabulary."""
    if largest >= tokenizer.vocab_size:
        raise UserError(
            f"{where}id {largest} is beyond this tokenizer's vocabulary of {tokenizer.vocab_size}; the data was made"
            " with another tokenizer"
        )


def tokenizer_of_data(name: str, prefix: str) -> Tokenizer:
    """The tokenizer of `name`, to look at data with.

    Raises:
        UserError: as `load_tokenizer`; or the data's manifest says that it was made with another.
    """
    tokenizer, told = load_tokenizer(name), tokenizer_of(prefix)
    if told and told["sha256"] != tokenizer.digest:
        raise UserError(f"{name} is not the tokenizer that {prefix} was made with ({told['name']})")
    return tokenizer


def load_tokenizer(name: str, allow_special: bool = False) -> Tokenizer:
    """The reference tokenizer of a file, a folder, `tiktoken:NAME`, or a Hugging Face hub name.

    Raises:
        UserError: it does not exist or is of no known form.
    """
    if name.startswith("tiktoken:"):
        return TikToken(name, allow_special)
    path = tokenizer_file(name)
    if path.endswith(".json"):
        return HuggingFace(path, allow_special)
    if is_tiktoken(path):
        return TikToken(path, allow_special)
    return SentencePiece(path, allow_special)


def is_tiktoken(path: str) -> bool:
    """Whether the first line is a base64 token and a rank."""
    with open(path, "rb") as file:
        parts = file.readline(200).split()
    try:
        return len(parts) == 2 and parts[1].isdigit() and bool(base64.b64decode(parts[0], validate=True))
    except ValueError:
        return False


def tiktoken_ranks(path: str) -> dict[bytes, int]:
    """Tokens and their ranks from a tiktoken file."""
    ranks = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    token, rank = line.split()
                    ranks[base64.b64decode(token)] = int(rank)
                except ValueError as error:
                    raise UserError(f"{path} line {number} is no base64 token and rank") from error
    return ranks


def file_digest(path: str) -> str:
    """sha256 of a file."""
    return sha256(Path(path).read_bytes()).hexdigest()


def with_special(ids: list[int], decode, special: dict[int, str]) -> str:
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
