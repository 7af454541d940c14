"""Text files are UTF-8 in every locale: what a Latin-1 locale writes, or fails to, no other machine reads."""

import ast
from collections.abc import Iterator

import pytest

from tests.test_layering import OURS, ROOT

NO_FILES = {"os", "fs"}  # whose `open` gives no text


def text_without_encoding(source: str) -> Iterator[int]:
    """Lines that open a file as text, or read or write it whole, and leave the encoding to the locale."""
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or any(word.arg == "encoding" for word in call.keywords):
            continue
        if isinstance(call.func, ast.Attribute) and call.func.attr in ("read_text", "write_text"):
            yield call.lineno
        owner = getattr(getattr(call.func, "value", None), "id", None)
        if getattr(call.func, "attr", getattr(call.func, "id", None)) == "open" and owner not in NO_FILES:
            given = [*call.args, *(word.value for word in call.keywords)]
            said = [each.value for each in given if isinstance(each, ast.Constant) and isinstance(each.value, str)]
            if not any("b" in mode and set(mode) <= set("rwxab+") for mode in said):
                yield call.lineno


@pytest.mark.parametrize("room", [*OURS, "examples"])
def test_no_text_file_is_of_the_locales_encoding(room):
    found = {
        str(path.relative_to(ROOT)): lines
        for path in (ROOT / room).rglob("*.py")
        if (lines := list(text_without_encoding(path.read_text(encoding="utf-8"))))
    }
    assert not found


def test_what_counts_as_text():
    text = "open(p)\nopen(p, 'w')\np.open('a+')\np.read_text()\np.write_text('b')"
    assert list(text_without_encoding(text)) == [1, 2, 3, 4, 5]
    other = "open(p, 'rb')\np.open('xb')\nos.open(p, 1)\nread_text(p)\np.read_text(encoding='utf-8')\np.open(mode='wb')"
    assert not list(text_without_encoding(other))
