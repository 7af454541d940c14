"""Kinds of tokens against what a person wrote down, token by token."""

import pytest

from megatron_taipan.evaluation.token_kinds import OF_WORDS, token_kinds, touched

SHORT = dict(zip(OF_WORDS, "FCNPW", strict=True))


def letters(parts: list[bytes]) -> str:
    """The kinds of the tokens, a letter each: First, Continuation, Number, Punctuation, White space."""
    found = token_kinds(list(range(len(parts))), parts)
    rows = [[SHORT[kind] for kind in OF_WORDS if found[kind][i]] for i in range(len(parts))]
    assert all(len(row) == 1 for row in rows), "every token has exactly one"
    return "".join(row[0] for row in rows)


def which(kind: str, parts: list[bytes], ids: list[int] | None = None) -> list[int]:
    """The tokens of a kind."""
    return [i for i, found in enumerate(token_kinds(ids or list(range(len(parts))), parts)[kind]) if found]


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ("The| qu|ick| fox|.", "FFCFP"),
        ("x| =| 12|3|.5|;", "FPNNNP"),
        ("    |if| a|:|\n|\t\t|\n\n    ", "WFFPWWW"),
        ("self|.layer|_|2|norm|(|)", "FFCNCPP"),  # a piece that begins with a sign is of its word
        ("don|'t| “|yes|”|—", "FFPFPP"),
        ("naïve| caf|é|s|½| Ⅷ|٣", "FFCCNNN"),
        ("हि|न्दी| e|\u0301t", "FCFC"),  # combining marks belong to words
        ("漢|字|。|👍|\u200b| \u3000|\x00", "FCPPPWP"),
    ],
)
def test_each_token_has_its_kind(tokens, expected):
    assert letters([token.encode() for token in tokens.split("|")]) == expected


def test_bytes_of_a_character_are_of_its_kind():
    assert letters([b"a ", b"\xc3", b"\xa9", b"t", b" \xe2\x80", b"\x9c", b"", b"\xd9", b"\xa3"]) == "FFFCPPWNN"
    assert touched([b"a\xe2", b"\x82", b"", b"\xacb", b"c"]) == [
        range(2),
        range(1, 2),
        range(0),
        range(1, 3),
        range(3, 4),
    ]


def test_names_are_new_once_and_then_repeated():
    text = "The| cat| saw| An|na|.| Then| the| dog| saw| An|na|,| and| Anna| saw| U|.| The| end"
    parts = [token.encode() for token in text.split("|")]
    assert which("name, first occurrence", parts) == [3, 4, 6]  # "Then" too: no "then" shows that it is none
    assert which("name, repeated", parts) == [10, 11, 14]


def test_identifiers_are_names():
    text = "max|_|len| =| 3|;| maxLen|,| max|,| x2| +| max|_|len|,| 2|nd|,| maxLen|s| __| x2| _"
    parts = [token.encode() for token in text.split("|")]
    assert which("name, first occurrence", parts) == [0, 1, 2, 6, 10, 19, 20, 21]
    assert which("name, repeated", parts) == [12, 13, 14, 22]


def test_bigrams_are_of_ids():
    ids = [5, 6, 7, 5, 6, 6, 6, 7, 5]
    parts = [b"a"] * len(ids)
    assert which("bigram seen before", parts, ids) == [4, 6, 7, 8]
    assert which("bigram seen before", [b"a"], [5]) == []
