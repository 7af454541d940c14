"""Recipes: where a corpus comes from, its licence, and how a record of it becomes text."""

from dataclasses import dataclass, fields
from pathlib import Path

from megatron_taipan.errors import UserError
from megatron_taipan.plain_yaml import LONGEST_YAML, parse_yaml

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Recipe:
    """One corpus.

    Attributes:
        name, source, licence, about: for the reader; `source` is a hub name or an address.
        verified: against what the schema was checked.
        config, split: parts of a hub dataset.
        text_field or template: how a record becomes text.
        schema: field names and the types of their values, as the corpus has them; a list holds the type of its entries.
        example: a small record of that schema.
        renders: the text that the example becomes, with the template's marks of what is learned.
    """

    name: str
    source: str
    licence: str
    about: str
    verified: str
    schema: dict
    example: dict
    renders: str
    config: str | None = None
    split: str = "train"
    text_field: str | None = None
    template: str | None = None


def names() -> list[str]:
    """All recipes that are shipped."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """A shipped recipe by name, or one from a file.

    Raises:
        UserError: it does not exist or is not a recipe.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    try:
        with open(path, encoding="utf-8") as file:
            content = parse_yaml(file.read(LONGEST_YAML + 1))
    except OSError as error:
        raise UserError(f"there is no recipe {name}; shipped are {', '.join(names())}") from error
    except ValueError as error:
        raise UserError(f"{path} is not a recipe: {' '.join(str(error).split())}") from error
    known = {field.name for field in fields(Recipe)}
    required = {"name", "source", "licence", "about", "verified", "schema", "example", "renders"}
    wrong = (set(content) - known) | (required - set(content)) if isinstance(content, dict) else required
    if wrong:
        raise UserError(f"{path} is not a recipe: missing or unknown {', '.join(sorted(map(str, wrong)))}")
    for name, value in content.items():
        kind = dict if name in ("schema", "example") else str
        if value is not None and not isinstance(value, kind):
            raise UserError(f"{path}: {name} is not a {'mapping' if kind is dict else 'text'}")
    if bool(content.get("text_field")) == bool(content.get("template")):
        raise UserError(f"{path}: exactly one of text_field and template must be given")
    return Recipe(**content)
