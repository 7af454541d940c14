"""What layers measure while they run, by name: `layers.5.selected` is metric `selected` of the layer at place 5."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_taipan.layer_kinds.registry import kind_of

if TYPE_CHECKING:
    from megatron_taipan.model_config import ModelConfig

Value = TypeVar("Value")

# in logs; before version 0.3 the gates' alone, counted among themselves: gate0/selected
LOGGED = re.compile(r"(layers\.\d+)\.(\w+)|(gate\d+)/(\w+)")


def metric_name(layer: int, metric: str) -> str:
    """The name in logs and results."""
    return f"layers.{layer}.{metric}"


class LayerMetrics:
    """The places of the metrics of a network's layers in the one vector in which they leave the device.

    The order is that of the layers, and of `LayerKind.metrics` in each. Nothing else counts positions.
    """

    def __init__(self, config: "ModelConfig"):
        self.gated = config.gated_layers
        self.names: list[str] = []
        self.spans: list[slice] = []  # by layer
        for layer, letter in enumerate(config.letters):
            start = len(self.names)
            self.names += [metric_name(layer, metric) for metric in kind_of(letter).metrics]
            self.spans.append(slice(start, len(self.names)))

    def named(self, values: Sequence[Value]) -> dict[str, Value]:
        """The vector's values by their names."""
        return dict(zip(self.names, values, strict=True))

    def gate_places(self, metric: str) -> list[int]:
        """The place in the vector of a metric of each layer with a gate."""
        return [self.names.index(metric_name(layer, metric)) for layer in self.gated]

    def of_gates(self, values: Mapping[str, Value], metric: str) -> list[Value]:
        """A metric of each layer with a gate, in their order."""
        return [values[metric_name(layer, metric)] for layer in self.gated]


def logged(record: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """A metric of every layer in a record of log.jsonl, by the layer's name; old logs have `gate0` for it."""
    found = ((LOGGED.fullmatch(key), value) for key, value in record.items())
    return {m[1] or m[3]: value for m, value in found if m and (m[2] or m[4]) == metric}
