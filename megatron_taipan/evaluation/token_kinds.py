"""What kind of token each token of a document is, from its text only.

A word is a longest run of letters, combining marks, digits and underscores. A token touches the characters of its text,
including those of which it has only some bytes. The first letter, mark, digit or underscore that it touches decides;
"_" counts as a letter. Every token has exactly one of these kinds:

    first piece of a word   a word begins with that letter: the character before it does not belong to a word
    continuation of a word  the letter follows a letter, mark, digit or underscore
    number                  it is a digit or another numeral (Unicode N*), inside a word or not
    punctuation or symbol   no such character, but something besides white space
    white space             all else: blanks, indentation, ends of lines, and tokens without characters

and may belong to these too:

    name, first occurrence  its word is a name, which occurs here for the first time in the document
    name, repeated          its word is a name that occurred before
    bigram seen before      the token and the one before it were next to each other earlier in the document

A name is a word of at least two characters that begins with a letter or underscore and holds an underscore, a digit, or
an upper-case letter after a lower-case one; or begins with an upper-case letter and occurs nowhere in the document
in lower case, which leaves out "The" at the start of a sentence where the document has a "the".
"""

import re
import unicodedata
from itertools import accumulate, pairwise

OF_WORDS = ("first piece of a word", "continuation of a word", "number", "punctuation or symbol", "white space")
FIRST, CONTINUATION, NUMBER, SYMBOL, WHITE = OF_WORDS
NEW_NAME, OLD_NAME, OLD_BIGRAM = "name, first occurrence", "name, repeated", "bigram seen before"


def token_kinds(ids: list[int], parts: list[bytes]) -> dict[str, list[bool]]:
    """For each kind, whether each token is of it.

    Args:
        parts: the bytes of each token; concatenated they are UTF-8 text.
    """
    text = b"".join(parts).decode()
    sorts = "".join(map(_sort, text))
    kinds, deciding = zip(*(_kind(sorts, span) for span in touched(parts)), strict=True)
    repeated = _names(text, sorts)
    of_name = [repeated.get(at) for at in deciding]
    return {
        **{kind: [k == kind for k in kinds] for kind in OF_WORDS},
        NEW_NAME: [again is False for again in of_name],
        OLD_NAME: [again is True for again in of_name],
        OLD_BIGRAM: _seen_bigrams(ids),
    }


def touched(parts: list[bytes]) -> list[range]:
    """The characters of the concatenated parts that each part touches: those of which it holds at least one byte."""
    # a character begins at every byte that is not 0b10xxxxxx
    numbers = [n - 1 for n in accumulate(byte & 0xC0 != 0x80 for byte in b"".join(parts))]
    ends = list(accumulate(map(len, parts)))
    return [
        range(numbers[end - len(part)], numbers[end - 1] + 1) if part else range(0)
        for part, end in zip(parts, ends, strict=True)
    ]


def _sort(character: str) -> str:
    """The class of a character: "a" of words, "0" a numeral, " " white space, "." anything else."""
    category = unicodedata.category(character)
    if category[0] in "LM" or character == "_":
        return "a"
    return "0" if category[0] == "N" else " " if character.isspace() else "."


def _kind(sorts: str, span: range) -> tuple[str, int | None]:
    """The kind of a token that touches these characters, and which of them decided it, if it is of a word."""
    touched_sorts = sorts[span.start : span.stop]
    found = re.search("[a0]", touched_sorts)
    if found is None:
        return (SYMBOL if "." in touched_sorts else WHITE), None
    at = span.start + found.start()
    if found[0] == "0":
        return NUMBER, at
    return (CONTINUATION if at and sorts[at - 1] in "a0" else FIRST), at


def _names(text: str, sorts: str) -> dict[int | None, bool]:
    """For every character of a name, whether the name occurred before."""
    spans = [found.span() for found in re.finditer("[a0]+", sorts)]
    words = {text[first:end] for first, end in spans}
    seen: set[str] = set()
    repeated: dict[int | None, bool] = {}
    for first, end in spans:
        word = text[first:end]
        if _is_name(word, words):
            repeated |= dict.fromkeys(range(first, end), word in seen)
            seen.add(word)
    return repeated


def _is_name(word: str, words: set[str]) -> bool:
    """Whether a word is a name in a document of these words."""
    if len(word) < 2 or _sort(word[0]) == "0":
        return False
    compound = "_" in word or any(_sort(character) == "0" for character in word)
    humps = any(left.islower() and right.isupper() for left, right in pairwise(word))
    return compound or humps or word[0].isupper() and word.lower() not in words


def _seen_bigrams(ids: list[int]) -> list[bool]:
    """Whether each token and the one before it were next to each other earlier."""
    seen: set[tuple[int, int]] = set()
    again = [False]
    for pair in pairwise(ids):
        again.append(pair in seen)
        seen.add(pair)
    return again[: len(ids)]
