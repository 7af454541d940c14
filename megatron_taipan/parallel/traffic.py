"""What tensor parallelism sends, by formula; compared with what the counter saw in tests and in the benchmark.

With T = b l d elements of the stream, per layer, micro-batch and training step (forward and backward):

    M           one all-reduce of T each way, as in the Mamba-2 paper (arXiv 2405.21060, section 8.1)
    W, A        two all-reduces of T each way, attention and MLP (Megatron-LM, arXiv 1909.08053, section 3)
    S           the same, but the attention's forward all-reduce carries the n selected rows only: n d elements
                (all of T in shards, and with gate gradient "all"; with "sampled" in the steps that compute every query)
    embedding   one forward;  head: one backward, and per chunk of tokens the maxima and two sums of its rows

Where the groups of M (or the key-value heads) are fewer than the ranks, one small all-reduce of parameter gradients
comes in addition, and for M two of the norm's sums of squares. Sequence parallelism replaces each all-reduce of T by an
all-gather and a reduce-scatter, which together send as much, and adds the gradients of norms and gate, and one more
all-gather where a product's input is needed for the gradient of its weights (M and the MLP). Layers recorded as CUDA
graphs send all gradients of replicated parameters of a graph at once.

Recomputation sends more, which is not counted here: full all of the forward pass again, selective what has no
product with it, the edges of attention, the gate's numbers and the norm's sums.
"""

import math
from collections import Counter
from dataclasses import dataclass, field

from megatron_taipan.layer_kinds.registry import kind_of
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.ops.cross_entropy import CHUNK_ELEMENTS
from megatron_taipan.parameters import parameter_table


@dataclass
class Traffic:
    """Calls and payload bytes by collective."""

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, collective: str, n_bytes: int, calls: int = 1) -> None:
        self.calls[collective] += calls
        self.bytes[collective] += n_bytes * calls


class LayerTraffic(Traffic):
    """Adds up what layers send in one micro-batch's forward and backward pass, step by step."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        tensor: int,
        sequence: bool,
        batch: int,
        length: int,
        selected: list[int],
        width: int,
    ):
        super().__init__()
        self.config, self.tensor, self.sequence, self.batch, self.width = config, tensor, sequence, batch, width
        self.tokens = batch * length
        self.stream = self.tokens * config.d_model * width  # bytes of the residual stream
        self._selected = iter(selected)

    def next_selected(self) -> int:
        """Tokens that the next gated layer selects."""
        return next(self._selected)

    def all_reduce(self, n_bytes: int, calls: int = 1) -> None:
        """All-reduces of so many bytes each."""
        self.add("all_reduce", n_bytes, calls)

    def all_gather(self, n_bytes: int) -> None:
        """An all-gather that gives every rank so many bytes."""
        self.add("all_gather", n_bytes)

    def into_block(self) -> None:
        """The stream enters a block, and its gradient comes back."""
        if self.sequence:
            self.all_gather(self.stream)
            self.add("reduce_scatter", self.stream)
        else:
            self.all_reduce(self.stream)  # backward

    def input_for_weights(self) -> None:
        """A product's input, again, for the gradient of its weights."""
        if self.sequence:
            self.all_gather(self.stream)

    def out_of_block(self) -> None:
        """A block's partial sums are added to the stream."""
        if self.sequence:
            self.add("reduce_scatter", self.stream)
            self.all_gather(self.stream)
        else:
            self.all_reduce(self.stream)  # forward

    def norm(self) -> None:
        """The gradient of a norm's weight."""
        if self.sequence:
            self.all_reduce(4 * self.config.d_model)

    def mlp(self) -> None:
        """SwiGLU after its norm."""
        self.norm()
        self.into_block()
        self.input_for_weights()
        self.out_of_block()


def expected_traffic(
    config: ModelConfig, *, tensor: int, sequence: bool, batch: int, length: int, selected: list[int], width: int = 4
) -> Traffic:
    """Traffic of one micro-batch's forward and backward pass, without recomputation.

    Args:
        selected: number of selected tokens of the micro-batch in each S layer.
        width: bytes of an element in the compute precision; 4 for float32.
    """
    t = LayerTraffic(
        config, tensor=tensor, sequence=sequence, batch=batch, length=length, selected=selected, width=width
    )
    if tensor == 1:
        return t
    table = parameter_table(config, tensor)
    t.out_of_block()  # the embedding
    for index, letter in enumerate(config.letters):
        shared = [spec for name, spec in table.items() if name.startswith(f"layers.{index}.") and spec.summed]
        if shared:
            t.all_reduce(4 * sum(math.prod(spec.shape) for spec in shared))
        kind_of(letter).traffic(t)
    t.norm()
    t.into_block()  # the head
    rows_per_chunk = max(1, min(t.tokens, CHUNK_ELEMENTS // table["embedding.weight"].local_shape(tensor)[0]))
    chunks = -(-t.tokens // rows_per_chunk)
    t.calls["all_reduce"] += 2 * chunks
    t.bytes["all_reduce"] += 3 * 4 * t.tokens
    return t
