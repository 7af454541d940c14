"""Options given on the command line: `train.steps=100` sets one of them in the tree that a file gave."""

import re
from contextlib import suppress
from typing import Any, get_args

from megatron_taipan.config import Config
from megatron_taipan.config_errors import ConfigError, section_of
from megatron_taipan.plain_yaml import parse_yaml


def apply_override(tree: dict, override: str) -> None:
    """Sets one dotted key in place; the value is YAML.

    Raises:
        ConfigError: it is not section.key=value, its key is within a value, or its value is not YAML or only in part.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r} must have the form section.key=value, as in train.steps=100")
    *parents, last = key.split(".")
    node = tree
    for depth, parent in enumerate(parents, 1):
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            option = ".".join(parents[:depth])
            raise ConfigError(
                f"override {override!r}: {option} is a value, not a section; give all of it: {option}=..."
            )
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"override {override[:200]!r}: {error}") from error
    for found in re.finditer(r"\s#", text):
        with suppress(ValueError):  # cut within quotes
            if parse_yaml(text[: found.start()]) == value:  # `runs/try #2` would be `runs/try`
                raise ConfigError(
                    f"override {override[:200]!r}: what follows {found[0]!r} is a comment in YAML; quote the value,"
                    f" {key}='\"...\"', or leave the comment out"
                )
    if _takes_text([*parents, last]):
        node[last] = value if value is None or isinstance(value, str | list | dict) else text.strip()
    else:
        node[last] = _number(value)


def _takes_text(path: list[str]) -> bool:
    """Whether an option takes text but no number; what looks like a number is text there too, as it was written.

    A folder may be named after a job (checkpoint.dir=12345) or a day (2026-11-30).
    """
    section: Any = Config
    for part in path[:-1]:
        field = getattr(section, "model_fields", {}).get(part)
        section = section_of(field.annotation) if field else None
    field = getattr(section, "model_fields", {}).get(path[-1])
    kinds = set(get_args(field.annotation) or [field.annotation]) if field else set()
    return str in kinds and not kinds & {int, float, bool}


def _number(value: Any) -> Any:
    """YAML reads 5e-4 as text; pydantic would accept it for a float, so only exponents are converted here."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
