"""Recipes: where a corpus comes from, its licence and size, what it is for, and how a record of it becomes text."""

import re
from dataclasses import dataclass, fields
from pathlib import Path

from megatron_taipan.errors import UserError
from megatron_taipan.plain_yaml import read_yaml

FOLDER = Path(__file__).parent
TRAINING, EVALUATION = "training", "evaluation"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
COUNTS = ("documents", "bytes", "tokens")
KINDS = dict.fromkeys(("schema", "example"), (dict, "mapping")) | dict.fromkeys(COUNTS, (int, "whole number"))


@dataclass(frozen=True)
class Recipe:
    """One corpus.

    Attributes:
        name, licence, about: for the reader.
        source: a hub name, an address that `tokenize` reads, or in words where to get the data.
        verified: against what the schema was checked.
        purpose: "training", or "evaluation": what models are measured on, which training must not see.
        documents, bytes, tokens: of the split, as its card or its makers say; None where nobody does.
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
    purpose: str = TRAINING
    documents: int | None = None
    bytes: int | None = None
    tokens: int | None = None
    config: str | None = None
    split: str = "train"
    text_field: str | None = None
    template: str | None = None

    @property
    def input(self) -> str | None:
        """The source in the form of `tokenize --input`; None where the source is words."""
        if "://" in self.source:
            return self.source
        if HUB_NAME.fullmatch(self.source):
            return f"hub:{self.source}:{self.config or ''}:{self.split}"
        return None


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
        content = read_yaml(path)
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
        kind, called = KINDS.get(name, (str, "text"))
        if value is not None and type(value) is not kind:
            raise UserError(f"{path}: {name} is not a {called}")
    if content.get("purpose", TRAINING) not in (TRAINING, EVALUATION):
        raise UserError(f"{path}: purpose is {content['purpose']!r}; it must be {TRAINING} or {EVALUATION}")
    if bool(content.get("text_field")) == bool(content.get("template")):
        raise UserError(f"{path}: exactly one of text_field and template must be given")
    return Recipe(**content)
