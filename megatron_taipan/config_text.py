"""The configuration as text: YAML that reads back as the same, and the table of all options."""

from typing import Any

import yaml

from megatron_taipan.config import Config
from megatron_taipan.section import Section


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML, every option spelled out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def describe_options(section: type[Section] = Config, prefix: str = "") -> list[tuple[str, str, str]]:
    """Every option as (dotted name, default, meaning), in order, for `--help`."""
    rows = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            rows += describe_options(inner, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else yaml_text(field.default)
            rows.append((prefix + name, default, field.description or ""))
    return rows


def yaml_text(value: Any) -> str:
    """A value as YAML, on one line."""
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True).replace("...", "").strip()
