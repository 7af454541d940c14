"""The letters that stand for bytes in byte-level vocabularies (`bytes_to_unicode` of openai/gpt-2's encoder.py)."""


def byte_letters() -> dict[int, str]:
    """A printable letter for each byte: the 188 printable characters of Latin-1 stand for themselves, the other bytes,
    in order, are U+0100 and onward."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
