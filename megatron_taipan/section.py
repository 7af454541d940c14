"""What every part of the configuration's tree is made of."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of every part of the tree: unknown keys are errors, values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False)


def option(default: Any, help: str, **bounds: Any) -> Any:
    """A field with its meaning. `...` as default makes it required."""
    return Field(default, description=help, **bounds)
