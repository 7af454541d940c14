"""Text to ids and back, for programs that take prompts; and samples of the training text."""

import base64
from pathlib import Path
from typing import Protocol

from megatron_taipan.config import DataConfig
from megatron_taipan.data.made_with import added_ids
from megatron_taipan.data.sources import open_source, standing
from megatron_taipan.data.special_tokens import find_role
from megatron_taipan.errors import UserError

# How Llama-3's tokenizer cuts text before joining bytes, and the special tokens behind its ranks. data_prep numbers
# them alike.
TIKTOKEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
TIKTOKEN_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>")


class TextCodec(Protocol):
    """What generation needs of a tokenizer."""

    end_ids: tuple[int, ...]
    """Ids that end a document."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: list[int]) -> str: ...


class SentencePieceCodec:
    """A sentencepiece model (`.model`)."""

    def __init__(self, path: Path):
        import sentencepiece

        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise UserError(f"{path} is no sentencepiece model: {' '.join(str(error).split())}") from error
        self.end_ids: tuple[int, ...] = (self.processor.eos_id(),) if self.processor.eos_id() >= 0 else ()

    def encode(self, text: str) -> list[int]:
        return self.processor.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode([i for i in ids if i < self.processor.get_piece_size()])


class TokenizersCodec:
    """A `tokenizer.json` of the tokenizers library."""

    def __init__(self, path: Path):
        from tokenizers import Tokenizer

        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is no tokenizer.json: {' '.join(str(error).split())}") from error
        self.tokenizer.no_truncation()  # the file may ask for either; the data is tokenized without
        self.tokenizer.no_padding()
        self.tokenizer.encode_special_tokens = True  # special tokens in a text are text
        special = {i: t.content for i, t in self.tokenizer.get_added_tokens_decoder().items() if t.special}
        # several where nothing says which it is: whichever the data has, it ends a text
        self.end_ids = tuple(find_role("eos_token", path, self.tokenizer.token_to_id, special).candidates)
        # what an exported sentencepiece model puts before a text, and leaves there in decoding
        self.added = " " if self.tokenizer.decode(self.encode("a")) == " a" else ""

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids).removeprefix(self.added)


class TikTokenCodec:
    """A file of base64 tokens and ranks (Llama-3's `tokenizer.model`)."""

    def __init__(self, path: Path):
        import tiktoken

        ranks = read_tiktoken(path)
        special = {name: len(ranks) + i for i, name in enumerate(TIKTOKEN_SPECIAL)}
        self.encoding = tiktoken.Encoding(
            path.name, pat_str=TIKTOKEN_PATTERN, mergeable_ranks=ranks, special_tokens=special
        )
        self.end_ids: tuple[int, ...] = (special[TIKTOKEN_SPECIAL[1]],)

    def encode(self, text: str) -> list[int]:
        return self.encoding.encode(text, disallowed_special=())

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode([i for i in ids if i < self.encoding.n_vocab])


def is_tiktoken(path: Path) -> bool:
    """Whether the first line is a base64 token and a rank."""
    with path.open("rb") as file:
        parts = file.readline(200).split()
    try:
        return len(parts) == 2 and parts[1].isdigit() and bool(base64.b64decode(parts[0], validate=True))
    except ValueError:
        return False


def read_tiktoken(path: Path) -> dict[bytes, int]:
    """Tokens and ranks.

    Raises:
        UserError: a line is something else.
    """
    ranks = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise UserError(f"{path} line {number} is no base64 token and rank") from error
    return ranks


def load_codec(path: Path, data: DataConfig | None = None) -> TextCodec:
    """The tokenizer in a file, by its ending.

    Args:
        data: what the model was trained on; the token that its manifests say ends a document is the one that ends a
            text.

    Raises:
        UserError: the file is missing or of another kind.
    """
    if not path.is_file():
        raise UserError(f"the tokenizer {path} does not exist")
    codec = _by_ending(path)
    told = added_ids(source.prefix for source in data.train) if data else {}
    if "eod" in told:
        codec.end_ids = (told["eod"],)
    return codec


def _by_ending(path: Path) -> TextCodec:
    if is_tiktoken(path):
        return TikTokenCodec(path)
    if path.suffix == ".model":
        return SentencePieceCodec(path)
    if path.suffix == ".json":
        return TokenizersCodec(path)
    raise UserError(f"{path}: tokenizers are read from .model (sentencepiece, tiktoken) and .json (tokenizers) files")


def sample_texts(data: DataConfig, tokenizer: Path, count: int = 200, longest: int = 4000) -> list[str]:
    """Text of up to `count` training documents, decoded, spread evenly over the datasets; none where the data is gone.

    Args:
        longest: tokens taken of each document.
    """
    codec, texts = load_codec(tokenizer, data), []
    for source in data.train:
        if not standing(source.prefix):
            continue
        reader = open_source(source.prefix)
        step = max(1, reader.n_documents * len(data.train) // count)
        for index in range(0, reader.n_documents, step):
            ids = reader.document(index)[:longest].tolist()
            texts.append(codec.decode([i for i in ids if i not in codec.end_ids]))
    return texts
