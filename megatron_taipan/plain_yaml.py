"""YAML that somebody else may have written: plain values, in bounded time and memory."""

from pathlib import Path
from typing import Any

import yaml

MOST_ALIASES = 16  # of a text: twenty of them, nested, already expand to thousands of copies
LONGEST_YAML = 1 << 20  # characters


def parse_yaml(text: str) -> Any:
    """As `yaml.safe_load`.

    Raises:
        ValueError: it is not YAML, or uses what is not read here; the message is one line.
    """
    if len(text) > LONGEST_YAML:
        raise ValueError(f"it has more than {LONGEST_YAML:,} characters")
    try:
        return _Loader(text).get_single_data()
    except RecursionError as error:
        raise ValueError("it is too deeply nested") from error
    except (yaml.YAMLError, ValueError, AttributeError) as error:  # not of its syntax but of a value, as 2026-13-45
        raise ValueError(f"it is not valid YAML: {' '.join(str(error).split())}") from error


def read_yaml(path: str | Path) -> Any:
    """`parse_yaml` of a file, of which no more is read than may be parsed.

    Raises:
        OSError: it cannot be read.
        ValueError: as `parse_yaml`; of these UnicodeDecodeError, where it is not UTF-8.
    """
    with open(path, encoding="utf-8") as file:
        return parse_yaml(file.read(LONGEST_YAML + 1))


class _Loader(yaml.SafeLoader):
    """The safe loader, which gives plain values only, without the copies of copies of which a few lines can make
    billions, and without values that contain themselves."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.aliases = 0
        self.unfinished: list[str | None] = []  # anchors of the values that are being read

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self.aliases += 1
            if self.aliases > MOST_ALIASES:
                raise yaml.YAMLError(f"more than {MOST_ALIASES} aliases (*{event.anchor}); write the values out")
            if event.anchor in self.unfinished:
                raise yaml.YAMLError(f"the alias *{event.anchor} is within its own value")
            return super().compose_node(parent, index)
        self.unfinished.append(event.anchor)
        node = super().compose_node(parent, index)
        self.unfinished.pop()
        return node
