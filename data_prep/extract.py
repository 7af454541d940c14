"""The text of a structured record: one field, or several put into a template, which may mark what of it is learned."""

import argparse
import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from math import isfinite
from string import Formatter
from typing import cast

from megatron_taipan.errors import UserError

GENERATION, END = "generation", "endgeneration"  # the marks' names in the chat templates of transformers
TEMPLATE_MARK = re.compile(r"\{\{|\{%\s*(.*?)\s*%\}", re.DOTALL)  # a mark's name; or a brace that is text, as in {{%


@dataclass(frozen=True, slots=True)
class Marked:
    """A text of which parts are learned.

    Attributes:
        text: all of it.
        borders: characters where a part ends and the next begins, rising; parts are by turns not learned (the first)
            and learned. One border: a prompt and an answer.
    """

    text: str
    borders: tuple[int, ...]


@dataclass(frozen=True)
class Extract:
    """The text of a parsed record.

    Attributes:
        fields: what it is made of, dotted paths; of a table no other columns need be read.
        take: raises ValueError where there is no text.
    """

    fields: tuple[str, ...]
    take: Callable[[object], str | Marked]

    def __call__(self, record: object) -> str | Marked:
        return self.take(record)


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say where the text is."""
    parser.add_argument(
        "--text-field",
        help="field of the text in JSON and tables (default: text); dots are part of its name or go inside",
    )
    parser.add_argument(
        "--template",
        help="text made of fields: 'Question: {question}\\nAnswer: {answers.text.0}'; what is between"
        f" {{%% {GENERATION} %%}} and {{%% {END} %%}}, if anything does, is what training learns",
    )
    parser.add_argument(
        "--recipe",
        help="name or file of a recipe, which says field or template (`data_prep recipes` lists them); --text-field and"
        " --template come before what it says",
    )


def extractor(args: argparse.Namespace) -> Extract:
    """What the options ask for.

    Raises:
        UserError: field and template both, or a template without fields.
    """
    if args.text_field and args.template:
        raise UserError("--text-field and --template exclude each other; give one")
    template, field = _form(args)
    return template_extractor(template) if template else field_extractor(field)


def marks_learned(args: argparse.Namespace) -> bool:
    """Whether the template marks what is learned: then every text is a `Marked`."""
    template, _ = _form(args)
    return len(spans(template)) > 1


def _form(args: argparse.Namespace) -> tuple[str, str]:
    """Template, empty where there is none, and field."""
    if args.recipe and not form_given(args):
        from data_prep.recipes import load_recipe  # here, because a start without one need not read YAML

        recipe = load_recipe(args.recipe)
        return recipe.template or "", recipe.text_field or ""
    return (args.template or "").replace("\\n", "\n"), args.text_field or "text"


def form_given(args: argparse.Namespace) -> str:
    """The option that says where the text is whatever the recipe says; empty where none does."""
    return "--template" if args.template else "--text-field" if args.text_field else ""


def text_options(args: argparse.Namespace) -> dict[str, str]:
    """The same for the manifest. A recipe may be a file that is changed later, so its content counts and not its name
    alone."""
    if not args.recipe:
        return {"text": args.template or args.text_field or "text"}
    if form_given(args):
        return {"text": args.template or args.text_field, "recipe": args.recipe}
    from data_prep.recipes import load_recipe

    recipe = load_recipe(args.recipe)
    return {"text": recipe.template or recipe.text_field or "", "recipe": args.recipe}


def lookup(record: object, field: str) -> object:
    """The value at a dotted path; numbers go into lists. A name that has dots itself, as `content.text` may be, comes
    before what is inside `content`.

    Raises:
        ValueError: there is none.
    """
    if isinstance(record, dict) and field in record:
        return record[field]
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object but a {type(record).__name__}")
    value: object = record
    left = field.split(".")
    while left:
        if isinstance(value, list) and left[0].isdecimal():
            if int(left[0]) >= len(value):
                raise ValueError(f"no field {field!r}: the list has {len(value)} entries")
            value = value[int(left.pop(0))]
            continue
        count = next((n for n in range(len(left), 0, -1) if isinstance(value, dict) and ".".join(left[:n]) in value), 0)
        if not count:
            raise ValueError(f"no field {field!r}")
        value = cast(dict, value)[".".join(left[:count])]
        left = left[count:]
    return value


def field_extractor(field: str) -> Extract:
    """Takes the text from one field."""

    def extract(record: object) -> str:
        value = lookup(record, field)
        if not isinstance(value, str):
            raise ValueError(f"field {field!r} is not a text but a {type(value).__name__}")
        return value

    return Extract((field,), extract)


def template_extractor(template: str) -> Extract:
    """Fills `{field}` places with text or numbers; `{{` and `}}` are braces, marks say what is learned."""
    try:
        parts = [[(literal, field) for literal, field, *_ in Formatter().parse(span)] for span in spans(template)]
    except ValueError as error:
        raise UserError(f"template {template!r}: {error}") from error
    fields = tuple(field for part in parts for _, field in part if field)
    if not fields:
        raise UserError(f"template {template!r} names no field; write them as {{field}}")
    if len(parts) == 1:
        return Extract(fields, lambda record: _fill(parts[0], record))

    def extract(record: object) -> Marked:
        texts = [_fill(part, record) for part in parts]
        if not "".join(texts[1::2]).strip():
            raise ValueError(f"nothing to learn: no text between {{% {GENERATION} %}} and {{% {END} %}}")
        return Marked("".join(texts), borders(texts))

    return Extract(fields, extract)


def _fill(part: list[tuple[str, str | None]], record: object) -> str:
    """Literals, each with the field after it, as text."""
    out = []
    for literal, field in part:
        out.append(literal)
        if field:
            value = lookup(record, field)
            if not isinstance(value, (str, int, float)):
                raise ValueError(f"field {field!r} is not a text but a {type(value).__name__}")
            if isinstance(value, float) and not isfinite(value):
                raise ValueError(f"field {field!r} is not a number but {value}")
            out.append(str(value))
    return "".join(out)


def spans(template: str) -> list[str]:
    """A template cut at its marks: by turns not learned (the first, maybe empty) and learned; whole where it has none.

    Raises:
        UserError: another mark than these two, or not in turns.
    """
    found: list[str] = []
    begin = 0
    for mark in TEMPLATE_MARK.finditer(template):
        if mark[1] is None:
            continue
        if mark[1] != (END if len(found) % 2 else GENERATION):
            raise UserError(
                f"template {template!r}: {mark[0]} at character {mark.start()}; the marks are {{% {GENERATION} %}} and"
                f" {{% {END} %}}, in turns"
            )
        found.append(template[begin : mark.start()])
        begin = mark.end()
    if len(found) % 2:
        raise UserError(f"template {template!r}: {{% {END} %}} is missing")
    return [*found, template[begin:]]


def borders(texts: list[str]) -> tuple[int, ...]:
    """Where, in texts that are by turns not learned and learned, one ends and the next begins; empty ones are none."""
    turns: list[int] = []
    for number, end in enumerate(accumulate(map(len, texts))):
        if texts[number] and number % 2 != len(turns) % 2:
            turns.append(end - len(texts[number]))
    return tuple(turns)
