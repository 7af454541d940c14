"""The pattern's grammar: what it means, and where it points when it is wrong."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_taipan.errors import UserError
from megatron_taipan.layer_kinds.registry import KINDS
from megatron_taipan.pattern import MAX_LAYERS, parse_pattern

# A tree of layers -> (how it may be written, the letters it stands for). Cuts are tested apart.
LETTER = st.sampled_from(sorted(KINDS)).map(lambda c: (c, c))
SPACE = st.sampled_from(["", " ", "  ", "\n"])


def sequence(items):
    spaced = st.tuples(SPACE, st.lists(st.tuples(items, SPACE), min_size=1, max_size=4))
    return spaced.map(lambda s: (s[0] + "".join(i[0] + gap for i, gap in s[1]), "".join(i[1] for i, _ in s[1])))


def repeated(items):
    group = st.one_of(LETTER, sequence(items).map(lambda s: (f"({s[0]})", s[1])))
    return st.tuples(group, SPACE, SPACE, st.integers(1, 3)).map(
        lambda r: (f"{r[0][0]}{r[1]}*{r[2]}{r[3]}", r[0][1] * r[3])
    )


PATTERNS = sequence(st.recursive(LETTER, lambda inner: st.one_of(inner, repeated(inner)), max_leaves=6))


@settings(max_examples=100)
@given(PATTERNS)
def test_repeats_groups_and_spaces_mean_what_they_say(pattern):
    text, letters = pattern
    assert parse_pattern(text).letters == letters
    assert parse_pattern(text).cuts == ()


@pytest.mark.parametrize(
    ("text", "letters", "cuts"),
    [
        ("(M*6 S)*3", "MMMMMMSMMMMMMSMMMMMMS", ()),
        ("M*6S|M*6S", "MMMMMMSMMMMMMS", (7,)),
        ("M | W | A", "MWA", (1, 2)),
        ("(M |)*2 A", "MMA", (1, 2)),
        ("(M S | W)*2", "MSWMSW", (2, 5)),
        ("((M*2 S)*2 A)*2", "MMSMMSAMMSMMSA", ()),
        ("M*010", "M" * 10, ()),
        (f"M*{MAX_LAYERS}", "M" * MAX_LAYERS, ()),
    ],
)
def test_examples(text, letters, cuts):
    parsed = parse_pattern(text)
    assert (parsed.letters, parsed.cuts) == (letters, cuts)


@pytest.mark.parametrize(
    ("text", "at", "word"),
    [
        ("", 0, "no layer"),
        ("   ", 0, "no layer"),
        ("M X S", 2, "'X'"),
        ("m", 0, "'m'"),
        ("(M*6 S", 0, "never closed"),
        ("M (S (W) A", 2, "never closed"),
        ("M S) W", 3, "closes nothing"),
        ("M () S", 2, "no layer"),
        ("M*", 2, "whole number"),
        ("M*0 S", 2, "whole number"),
        ("M*S", 2, "whole number"),
        ("M*-1", 2, "whole number"),
        ("*3", 0, "'*'"),
        ("M**3", 2, "whole number"),
        ("M*2*2", 3, "'*'"),
        ("| M", 0, "both sides"),
        ("M |", 2, "both sides"),
        ("M || S", 2, "both sides"),
        ("M*4097", 2, "4097"),
        ("(M*100)*100", 8, "10000"),
        ("M*99999999999999999999", 2, "more than 4096"),
        ("M²", 1, "'²'"),
    ],
)
def test_faults_are_pointed_at(text, at, word):
    with pytest.raises(UserError) as raised:
        parse_pattern(text)
    message, shown, pointer = str(raised.value).rsplit("\n", 2)
    assert shown == f"  {text}" and pointer == "  " + " " * at + "^"
    assert word in message and message.startswith("model.pattern: ")


@settings(max_examples=200)
@given(st.text("MSWA()*|3 0x", max_size=20))
def test_any_text_is_parsed_or_refused(text):
    try:
        parsed = parse_pattern(text)
    except UserError:
        return
    assert set(parsed.letters) <= set(KINDS) and parsed.letters
    assert all(0 < cut < len(parsed.letters) for cut in parsed.cuts)
