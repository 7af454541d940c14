"""Which bytes of a text each of its tokens stands for, to show tokens to a person.

Joined, the bytes are the text. Those of a token need not be whole characters: tokens may be single bytes. They are
empty where the tokenizer adds a blank of its own, or makes several tokens of a character that it writes in another way
first (1/2 of the sign for a half).
"""

import re

from megatron_taipan.tokenizer.byte_level import byte_letters

SPACE = "\u2581"  # how sentencepiece writes a blank
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # a token that is one byte, where the vocabulary lacks the character


def bytes_by_ends(data: bytes, ends: list[int], tokens: list[str]) -> list[bytes]:
    """What each token stands for: its own bytes where they are those of the text, else what its place says.

    Places know whole characters only. So runs of tokens that end at the same character are compared with it.

    Args:
        data: the text in UTF-8.
        ends: the byte of the text before which each token ends.
        tokens: vocabulary entries.
    """
    if not tokens:
        return []
    table = {letter: byte for byte, letter in byte_letters().items()}
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
