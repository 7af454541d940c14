"""The kinds of layers by letter. A kind that is not here is an error everywhere, never treated as another."""

from megatron_taipan.errors import UserError
from megatron_taipan.layer_kinds.attention import FULL_ATTENTION, WINDOW_ATTENTION
from megatron_taipan.layer_kinds.mamba2 import MAMBA2
from megatron_taipan.layer_kinds.record import LayerKind
from megatron_taipan.layer_kinds.selective import SELECTIVE_ATTENTION

KINDS: dict[str, LayerKind] = {
    kind.letter: kind for kind in (MAMBA2, SELECTIVE_ATTENTION, WINDOW_ATTENTION, FULL_ATTENTION)
}


def register(kind: LayerKind) -> None:
    """Makes a kind known to patterns and all that reads them; its block registers itself (model/blocks.py).

    Raises:
        ValueError: its letter is not a single letter, or another kind has it.
    """
    if len(kind.letter) != 1 or not kind.letter.isalpha():
        raise ValueError(f"the letter of a layer kind is one letter, not {kind.letter!r}")
    if KINDS.get(kind.letter, kind) is not kind:
        raise ValueError(f"the letter {kind.letter!r} already means a {KINDS[kind.letter].name}")
    KINDS[kind.letter] = kind


def kind_of(letter: str) -> LayerKind:
    """The kind of a letter.

    Raises:
        UserError: there is none.
    """
    if letter not in KINDS:
        raise UserError(f"unknown layer {letter!r}; known are {known_kinds()}")
    return KINDS[letter]


def kinds_of(letters: str) -> list[LayerKind]:
    """The kinds that occur, each once, in the order of the registry."""
    for letter in letters:
        kind_of(letter)
    return [kind for letter, kind in KINDS.items() if letter in letters]


def known_kinds() -> str:
    """Every letter with its name, for error messages."""
    return ", ".join(f"{letter} ({kind.name})" for letter, kind in KINDS.items())
