"""Text to ids and back, for programs that take prompts; and samples of the training text."""

from pathlib import Path
from typing import Protocol

from megatron_taipan.config import DataConfig
from megatron_taipan.data.indexed import IndexedReader
from megatron_taipan.errors import UserError


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
        self.tokenizer.encode_special_tokens = True  # special tokens in a text are text
        names = ("</s>", "<|end_of_text|>", "<|endoftext|>")
        found = (self.tokenizer.token_to_id(name) for name in names)
        self.end_ids = tuple(i for i in found if i is not None)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


def load_codec(path: Path) -> TextCodec:
    """The tokenizer in a file, by its ending.

    Raises:
        UserError: the file is missing or of another kind.
    """
    if not path.is_file():
        raise UserError(f"the tokenizer {path} does not exist")
    if path.suffix == ".model":
        return SentencePieceCodec(path)
    if path.suffix == ".json":
        return TokenizersCodec(path)
    raise UserError(f"{path}: tokenizers are read from .model (sentencepiece) and .json (tokenizers) files")


def sample_texts(data: DataConfig, tokenizer: Path, count: int = 200, longest: int = 4000) -> list[str]:
    """Text of up to `count` training documents, decoded, spread evenly over the datasets; none where the data is gone.

    Args:
        longest: tokens taken of each document.
    """
    codec, texts = load_codec(tokenizer), []
    for source in data.train:
        if not Path(f"{source.prefix}.idx").is_file():
            continue
        reader = IndexedReader(source.prefix)
        step = max(1, reader.n_documents * len(data.train) // count)
        for index in range(0, reader.n_documents, step):
            ids = reader.document(index)[:longest].tolist()
            texts.append(codec.decode([i for i in ids if i not in codec.end_ids]))
    return texts
