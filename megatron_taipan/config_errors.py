"""What is wrong with a configuration, in words: dotted keys, values, and the nearest known name."""

import difflib
from typing import Any, get_args

from pydantic import ValidationError

from megatron_taipan.config import Config
from megatron_taipan.config_text import describe_options
from megatron_taipan.data_config import DataSource
from megatron_taipan.errors import UserError
from megatron_taipan.gate_config import SCHEDULED_TAGS
from megatron_taipan.section import Section


class ConfigError(UserError):
    """The configuration is wrong; the message names the key and the numbers."""


def explain(error: ValidationError) -> str:
    """All faults on one line, each with its dotted key, unknown keys with the nearest known one."""
    faults = []
    for fault in error.errors():
        location = tuple(part for part in fault["loc"] if part not in SCHEDULED_TAGS)
        where = ".".join(str(part) for part in location)
        if fault["type"] == "extra_forbidden":
            faults.append(f"unknown key {where!r}{_nearest(location)}")
        elif fault["type"] == "missing":
            faults.append(f"{where} is required")
        elif fault["type"] == "value_error":
            faults.append(f"{where + ': ' if where else ''}{fault['ctx']['error']}")
        else:
            faults.append(f"{where}={fault['input']!r}: {fault['msg'][0].lower()}{fault['msg'][1:]}")
    return "; ".join(faults)


def _nearest(location: tuple) -> str:
    """`; did you mean train.steps?` where a known name is near, else the names known there."""
    section: Any = Config
    for part in location[:-1]:
        if isinstance(part, int):  # in a list, whose section is known already
            continue
        field = getattr(section, "model_fields", {}).get(part)
        section = section_of(field.annotation) if field else section
        if not (isinstance(section, type) and issubclass(section, Section)):
            section = DataSource  # short forms of data hold nothing else
    known = list(section.model_fields)
    prefix = ".".join(str(part) for part in location[:-1])
    prefix = prefix + "." if prefix else ""
    near = difflib.get_close_matches(str(location[-1]), known, 1, 0.5)
    if near:
        return f"; did you mean {prefix}{near[0]!r}?".replace("'", "")
    elsewhere = [name for name, _, _ in describe_options() if name.split(".")[-1] == location[-1]]
    if elsewhere:
        return f"; it belongs at {elsewhere[0]}"
    return f"; known there: {', '.join(known)}"


def section_of(annotation: Any) -> Any:
    """The section in `Section | None` or in a number that may be a schedule; anything else as it is."""
    inner = [a for arg in get_args(annotation) for a in (arg, *get_args(arg))]
    return next((a for a in inner if isinstance(a, type) and issubclass(a, Section)), annotation)
