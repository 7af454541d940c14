"""Which part of a text each of its tokens stands for, to show tokens to a person."""

import re

from megatron_taipan.inference.text import SentencePieceCodec, TextCodec, TikTokenCodec, TokenizersCodec

SPACE = "\u2581"  # how sentencepiece writes a blank
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token that is one byte, where the vocabulary lacks the character


def cut(codec: TextCodec, text: str) -> tuple[list[int], list[bytes]]:
    """The ids of a text, and for each the bytes of the text (UTF-8) that it stands for; joined they are the text.

    A part need not be whole characters: tokens may be single bytes. It is empty where the tokenizer adds a blank of its
    own, or makes several tokens of a character that it writes in another way first (1/2 of the sign for a half).

    Raises:
        TypeError: a codec that `inference.text.load_codec` does not make.
    """
    if isinstance(codec, TikTokenCodec):
        ids = codec.encode(text)
        return ids, [codec.encoding.decode_single_token_bytes(i) for i in ids]
    if isinstance(codec, SentencePieceCodec):
        ids, tokens, ends = _sentencepiece(codec, text)
    elif isinstance(codec, TokenizersCodec):
        ids, tokens, ends = _tokenizers(codec, text)
    else:
        raise TypeError(f"{type(codec).__name__} does not say where its tokens stand")
    return ids, _parts(text.encode(), ends, tokens)


def _sentencepiece(codec: SentencePieceCodec, text: str) -> tuple[list[int], list[str], list[int]]:
    """Ids, vocabulary entries, and the byte of the text before which each token ends."""
    from sentencepiece import sentencepiece_pb2

    found = sentencepiece_pb2.SentencePieceText()  # type: ignore[attr-defined]
    found.ParseFromString(codec.processor.encode(text, out_type="serialized_proto"))
    return [p.id for p in found.pieces], [p.piece for p in found.pieces], [p.end for p in found.pieces]


def _tokenizers(codec: TokenizersCodec, text: str) -> tuple[list[int], list[str], list[int]]:
    """As `_sentencepiece`. Tokens that share a character all have its place; it is the last one's here."""
    encoding = codec.tokenizer.encode(text, add_special_tokens=False)
    places = encoding.offsets  # (first, behind the last) in characters
    following = [*(first for first, _ in places[1:]), len(text)]
    ends = [min(end, first) for (_, end), first in zip(places, following, strict=False)]  # one too many without tokens
    at = [0]  # byte at which each character begins
    for character in text:
        at.append(at[-1] + len(character.encode()))
    return encoding.ids, encoding.tokens, [at[end] for end in ends]


def _parts(data: bytes, ends: list[int], tokens: list[str]) -> list[bytes]:
    """What each token stands for: its own bytes where they are those of the text, else what its place says.

    Places know whole characters only. So runs of tokens that end at the same character are compared with it.
    """
    if not tokens:
        return []
    table = _byte_level_table()
    ways = [
        [_plain_bytes(token) for token in tokens],
        [bytes(table[c] for c in token) if table.keys() >= set(token) else b"" for token in tokens],
    ]
    for own in ways:
        if b"".join(own) == data:
            return own
    parts: list[bytes] = []
    done = 0
    for i, end in enumerate([*ends[:-1], len(data)]):  # blanks that were dropped behind the last token are its part
        if end <= done and i + 1 < len(tokens):
            continue
        run, piece = slice(len(parts), i + 1), data[done:end]
        fitting = [own[run] for own in ways if b"".join(own[run]) == piece]
        parts += fitting[0] if fitting else [b""] * (i - len(parts)) + [piece]
        done = max(done, end)
    return parts


def _plain_bytes(token: str) -> bytes:
    """Of a vocabulary as sentencepiece writes it."""
    byte = BYTE.fullmatch(token)
    return bytes([int(byte[1], 16)]) if byte else token.replace(SPACE, " ").encode()


def _byte_level_table() -> dict[str, int]:
    """Of a vocabulary as GPT-2 writes it, a character a byte (`bytes_to_unicode` of openai/gpt-2's encoder.py).

    The 188 printable characters of Latin-1 stand for themselves, the other bytes, in order, for U+0100 and onward.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
