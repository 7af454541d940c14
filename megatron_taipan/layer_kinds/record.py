"""All that the project knows about a kind of layer, except its computation (model/blocks.py)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from megatron_taipan.param_spec import ParamSpec

if TYPE_CHECKING:
    from megatron_taipan.model_config import ModelConfig
    from megatron_taipan.parallel.context_traffic import PieceTraffic
    from megatron_taipan.parallel.traffic import LayerTraffic


class Split(NamedTuple):
    """A count that tensor ranks divide among themselves."""

    what: str  # the option, or what it is
    number: int
    shared: bool = False  # where the ranks are a multiple of the count, several may hold the same part


@dataclass(frozen=True)
class LayerKind:
    """One kind of layer; a pattern names it by its letter.

    The functions take the network's configuration. Parameters are named from the layer on ("mixer.D").
    """

    letter: str
    mixer: str  # what it mixes tokens by, in words: "sliding-window attention"
    noun: str  # "layer" or "block", for `name`
    parameters: "Callable[[ModelConfig, int], dict[str, ParamSpec]]"  # of (config, tensor ranks), in order
    flops: "Callable[[ModelConfig, int], float]"  # forward operations per token of documents of so many tokens
    check: "Callable[[ModelConfig], None]"  # raises ValueError where sizes do not fit
    splits: "Callable[[ModelConfig], tuple[Split, ...]]"  # what tensor parallelism divides
    traffic: "Callable[[LayerTraffic], None]"  # what tensor parallelism sends, see parallel/traffic.py
    options: tuple[str, ...]  # configuration options that change what it computes, in dotted names
    # what ranks with pieces of the same rows send, see parallel/context_traffic.py; None: it needs whole rows
    pieces: "Callable[[PieceTraffic], None] | None" = None
    metrics: tuple[str, ...] = ()  # what its block measures in every pass, by name; see Measured in model/stream.py
    residuals: int = 1  # times that it adds to the residual stream
    attends: bool = False  # runs the attention kernels, with heads of config.head_dim
    windowed: bool = False  # sees the last config.attention.window tokens at most
    growing: bool = False  # its decoding state grows with the text
    gated: bool = False  # has a gate that selects tokens (model/gate.py)
    capturable: bool = False  # never needs the host, so that CUDA graphs can hold it
    ends_graph: bool = False  # a recorded group of layers ends after it, if it is long enough

    @property
    def name(self) -> str:
        """The name in messages and reports."""
        return f"{self.mixer} {self.noun}"
