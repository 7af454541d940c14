"""List the corpora that `tokenize --recipe NAME` knows: purpose, licence, size and source. docs/corpora.md says how
each becomes training or evaluation data."""

import argparse
import json
from dataclasses import asdict

from data_prep.recipes import COUNTS, Recipe, load_recipe, names

COLUMNS = ("recipe", "purpose", *COUNTS, "licence", "source")
UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1, ""))
UNITS_OF_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="everything about each but its example, as one JSON object")


def run(args: argparse.Namespace) -> None:
    """Prints one line a recipe."""
    recipes = {name: load_recipe(name) for name in names()}
    if args.json:
        print(json.dumps({name: described(recipe) for name, recipe in recipes.items()}, indent=2))
        return
    rows = [COLUMNS, *(row(name, recipe) for name, recipe in recipes.items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for cells in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def described(recipe: Recipe) -> dict:
    """A recipe without what only its tests read."""
    about = {key: value for key, value in asdict(recipe).items() if key not in ("example", "renders", "schema")}
    return about | {"input": recipe.input, "fields": recipe.schema}


def row(name: str, recipe: Recipe) -> tuple[str, ...]:
    counts = (in_words(getattr(recipe, kind), UNITS_OF_BYTES if kind == "bytes" else UNITS) for kind in COUNTS)
    return (name, recipe.purpose, *counts, recipe.licence, recipe.input or recipe.source)


def in_words(count: int | None, units=UNITS) -> str:
    """Three digits and a unit: 39134000 is 39.1 M; - where nobody says."""
    if count is None:
        return "-"
    size, unit = next((pair for pair in units if count >= pair[0]), units[-1])
    return f"{count / size:.3g} {unit}".rstrip()
