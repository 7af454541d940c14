"""What every part of the configuration's tree is made of."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class Section(BaseModel):
    """Base of every part of the tree: unknown keys are errors, values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False)


def option(default: Any, help: str, **bounds: Any) -> Any:
    """A field with its meaning. `...` as default makes it required."""
    return Field(default, description=help, **bounds)


def faults(error: ValidationError) -> str:
    """What does not fit, in one line: `progress.step: input should be a valid integer`."""
    found = []
    for fault in error.errors()[:3]:
        where = ".".join(map(str, fault["loc"]))  # empty where options do not fit together
        text = fault["msg"].removeprefix("Value error, ")
        found.append(f"{where + ': ' if where else ''}{text[:1].lower()}{text[1:]}")
    more = len(error.errors()) - len(found)
    return "; ".join(found) + (f" and {more} more" if more else "")
