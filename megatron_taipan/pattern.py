"""The layer pattern: a string with one letter a layer, repeats and pipeline cuts.

    "(M*6 S)*3"        three groups of six Mamba-2 blocks and one selective attention layer
    "M*6 S | M*6 S"    the same stack cut in two pipeline stages after the first group

Grammar: sequence = item*; item = (letter | "(" sequence ")") ["*" integer] | "|". White space separates nothing.
"""

from dataclasses import dataclass
from functools import lru_cache

from megatron_taipan.errors import UserError
from megatron_taipan.layer_kinds.registry import KINDS, known_kinds

MAX_LAYERS = 4096


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern: `letters`, one a layer, and `cuts`, the layer indices before which a new stage starts."""

    letters: str
    cuts: tuple[int, ...]


@lru_cache(maxsize=64)  # every layer that is built asks for its letter
def parse_pattern(text: str) -> Pattern:
    """Reads a pattern string.

    Raises:
        UserError: with the pattern and a pointer at the offending character.
    """

    def fail(at: int, why: str) -> UserError:
        return UserError(f"model.pattern: {why}\n  {text}\n  {' ' * at}^")

    def sequence(at: int, depth: int) -> tuple[str, int]:
        """Letters (cuts kept as '|') from position `at` to the closing parenthesis or the end."""
        out = ""
        while at < len(text):
            char = text[at]
            if char.isspace():
                at += 1
                continue
            if char == ")":
                if depth == 0:
                    raise fail(at, "this ')' closes nothing")
                return out, at
            if char == "(":
                opened = at
                item, at = sequence(at + 1, depth + 1)
                if at >= len(text):
                    raise fail(opened, "this '(' is never closed")
                at += 1
                if not item.strip("|"):
                    raise fail(opened, "this group holds no layer")
            elif char in KINDS:
                item, at = char, at + 1
            elif char == "|":
                out, at = out + "|", at + 1
                continue
            else:
                raise fail(at, f"unknown layer {char!r}; known are {known_kinds()}")
            item, at = repeated(item, at)
            out += item
            if len(out.replace("|", "")) > MAX_LAYERS:
                raise fail(min(at, len(text) - 1), f"more than {MAX_LAYERS} layers")
        return out, at

    def repeated(item: str, at: int) -> tuple[str, int]:
        """Applies a `*integer` that follows the item, if there is one."""
        star = skip_spaces(at)
        if star >= len(text) or text[star] != "*":
            return item, at
        start = skip_spaces(star + 1)
        end = start
        while end < len(text) and text[end] in "0123456789":
            end += 1
        if start == end or int(text[start:end]) == 0:
            raise fail(min(start, len(text)), "'*' must be followed by a whole number of at least 1")
        count = int(text[start:end])
        if count * len(item.replace("|", "")) > MAX_LAYERS:
            raise fail(start, f"this repeat gives {count * len(item.replace('|', ''))} layers, more than {MAX_LAYERS}")
        return item * count, end

    def skip_spaces(at: int) -> int:
        while at < len(text) and text[at].isspace():
            at += 1
        return at

    flat, _ = sequence(0, 0)
    letters = flat.replace("|", "")
    if not letters:
        raise fail(0, "the pattern holds no layer")
    cuts, index = [], 0
    for char in flat:
        if char == "|":
            cuts.append(index)
        else:
            index += 1
    if any(c in (0, len(letters)) for c in cuts) or len(set(cuts)) != len(cuts):
        raise fail(text.index("|"), "a cut '|' must have at least one layer on both sides")
    return Pattern(letters, tuple(cuts))
