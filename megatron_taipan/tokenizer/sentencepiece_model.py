"""A sentencepiece .model file."""

from pathlib import Path
from typing import Any

from megatron_taipan.errors import UserError
from megatron_taipan.tokenizer.base import Encoded, Tokenizer, decode_with_special, file_digest, flatten
from megatron_taipan.tokenizer.files import EXPECTED
from megatron_taipan.tokenizer.token_bytes import bytes_by_ends

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # piece types of sentencepiece_model.proto
UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model, run by its own library."""

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
            self.model.LoadFromSerializedProto(Path(path).read_bytes())  # Load takes every name as UTF-8
        except (RuntimeError, OSError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} is not a sentencepiece model: {reason}; give {EXPECTED}") from error
        self.library = f"sentencepiece {sentencepiece.__version__}"
        self.vocab_size = self.model.vocab_size()
        self.control = {i: self.model.id_to_piece(i) for i in range(self.vocab_size) if self.model.is_control(i)}
        ends = {"eos_token": self.model.eos_id(), "bos_token": self.model.bos_id(), "pad_token": self.model.pad_id()}
        own = {kind: self.control[i] for kind, i in ends.items() if i in self.control}  # -1: there is none
        unknown = self.model.unk_id()
        own["unk_token"] = self.model.id_to_piece(unknown)
        self._find_roles(path, self.control, own, unknown)
        self.digest = file_digest(path)

    def encode_batch(self, texts: list[str]) -> Encoded:
        return flatten(self.model.encode(texts, num_threads=1))

    def token_id(self, token: str) -> int | None:
        found = self.model.piece_to_id(token)
        return found if self.model.id_to_piece(found) == token else None

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        if skip_special_tokens:
            return self.model.decode([i for i in ids if i < self.vocab_size])
        return decode_with_special(ids, self.model.decode, self.control)

    def encode_with_bytes(self, text: str) -> tuple[list[int], list[bytes]]:
        from sentencepiece import sentencepiece_pb2

        found = sentencepiece_pb2.SentencePieceText()  # type: ignore[attr-defined]
        found.ParseFromString(self.model.encode(text, out_type="serialized_proto"))
        ends = [piece.end for piece in found.pieces]  # in bytes of the text
        return [p.id for p in found.pieces], bytes_by_ends(text.encode(), ends, [p.piece for p in found.pieces])


def read_proto(path: str | Path) -> Any:
    """The parsed file (`ModelProto` of google/sentencepiece's sentencepiece_model.proto).

    Raises:
        ValueError: it is something else.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(Path(path).read_bytes())
    except Exception as error:  # protobuf's own class, in a module that moves between releases
        raise ValueError(f"it is not a sentencepiece model: {error}") from error
    return model
