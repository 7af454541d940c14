"""Numbers of tokens as a command line names them: 4K is 4096, 1M is 1,048,576."""

import re

from megatron_taipan.errors import UserError

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20}
GAP = "..."  # stands for lengths that go on by the same factor


def parse_length(word: str) -> int:
    """The tokens that a word such as `512`, `4K` or `1M` names.

    Raises:
        UserError: it is not a whole number of at least 1 with one of these letters.
    """
    match = re.fullmatch(r"(\d+)([KM]?)", word.strip().upper())
    tokens = int(match[1]) * UNITS[match[2]] if match else 0
    if tokens < 1:
        raise UserError(f"{word!r} is no number of tokens; write 512, 4K (4 x 1024) or 1M (1024 x 1024)")
    return tokens


def parse_lengths(words: str) -> list[int]:
    """Ascending lengths of a list such as `1K,4K,16K`; `1K,4K,...,1M` goes on by the same factor up to the last.

    Raises:
        UserError: a word is no length, or `...` does not stand between two lengths and a larger one.
    """
    parts, found = [word.strip() for word in words.split(",")], list[int]()
    for at, word in enumerate(parts):
        if word != GAP:
            found.append(parse_length(word))
            continue
        if at < 2 or GAP in parts[at - 2 : at] or at + 1 == len(parts) or found[-1] <= found[-2]:
            raise UserError(f"{words!r}: `...` stands after two rising lengths and before the last: 1K,4K,...,1M")
        factor, last = found[-1] / found[-2], parse_length(parts[at + 1])
        while found[-1] * factor < last:
            found.append(round(found[-1] * factor))
    return sorted(set(found))


def length_name(tokens: int) -> str:
    """The shortest word for it: 4096 is 4K, 1000 is 1000."""
    unit = next(letter for letter in ("M", "K", "") if tokens % UNITS[letter] == 0)
    return f"{tokens // UNITS[unit]}{unit}"
