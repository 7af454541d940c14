"""The text of a structured record: one field, or several put into a template."""

import argparse
from collections.abc import Callable
from string import Formatter

from megatron_taipan.errors import UserError

Extract = Callable[[object], str]  # the text of a parsed record; raises ValueError where there is none


def add_text_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that say where the text stands."""
    parser.add_argument("--text-field", help="field of the text in JSON and parquet (default: text); dots go inside")
    parser.add_argument("--template", help="text made of fields: 'Question: {question}\\nAnswer: {answers.text.0}'")
    parser.add_argument("--recipe", help="name or file of a recipe, which says field or template")


def extractor(args: argparse.Namespace) -> Extract:
    """What the options ask for.

    Raises:
        UserError: more than one of them, or a template without fields.
    """
    given = [name for name in ("text_field", "template", "recipe") if getattr(args, name)]
    if len(given) > 1:
        raise UserError(f"--{given[0].replace('_', '-')} and --{given[1]} exclude each other; give one")
    if args.template:
        return template_extractor(args.template.replace("\\n", "\n"))
    if args.recipe:
        from data_prep.recipes import load_recipe  # here, because a start without one need not read YAML

        recipe = load_recipe(args.recipe)
        return template_extractor(recipe.template) if recipe.template else field_extractor(recipe.text_field)
    return field_extractor(args.text_field or "text")


def text_options(args: argparse.Namespace) -> dict[str, str]:
    """The same for the manifest. A recipe may be a file that is changed later, so its content counts and not its name
    alone."""
    if args.recipe:
        from data_prep.recipes import load_recipe

        recipe = load_recipe(args.recipe)
        return {"text": recipe.template or recipe.text_field or "", "recipe": args.recipe}
    return {"text": args.template or args.text_field or "text"}


def lookup(record: object, field: str) -> object:
    """The value at a dotted path; numbers go into lists.

    Raises:
        ValueError: there is none.
    """
    for depth, name in enumerate(field.split(".")):
        if isinstance(record, list) and name.isdigit() and depth:
            if int(name) >= len(record):
                raise ValueError(f"no field {field!r}: the list has {len(record)} entries")
            record = record[int(name)]
        elif not isinstance(record, dict):
            raise ValueError(f"no field {field!r}" if depth else f"no JSON object but a {type(record).__name__}")
        elif name not in record:
            raise ValueError(f"no field {field!r}")
        else:
            record = record[name]
    return record


def field_extractor(field: str) -> Extract:
    """Takes the text from one field."""

    def extract(record: object) -> str:
        value = lookup(record, field)
        if not isinstance(value, str):
            raise ValueError(f"field {field!r} is no text but a {type(value).__name__}")
        return value

    return extract


def template_extractor(template: str) -> Extract:
    """Fills `{field}` places with text or numbers; `{{` and `}}` are braces."""
    try:
        parts = [(literal, field) for literal, field, *_ in Formatter().parse(template)]
    except ValueError as error:
        raise UserError(f"template {template!r}: {error}") from error
    if not any(field for _, field in parts):
        raise UserError(f"template {template!r} names no field; write them as {{field}}")

    def extract(record: object) -> str:
        out = []
        for literal, field in parts:
            out.append(literal)
            if field:
                value = lookup(record, field)
                if not isinstance(value, (str, int, float)):
                    raise ValueError(f"field {field!r} is no text but a {type(value).__name__}")
                out.append(str(value))
        return "".join(out)

    return extract
