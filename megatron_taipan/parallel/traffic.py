"""What tensor parallelism sends, by formula; compared with what the counter saw in tests and in the benchmark.

With T = b l d elements of the stream, per layer, micro-batch and training step (forward and backward):

    M           one all-reduce of T each way, as in the Mamba-2 paper (arXiv 2405.21060, section 8.1)
    W, A        two all-reduces of T each way, attention and MLP (Megatron-LM, arXiv 1909.08053, section 3)
    S           the same, but the attention's forward all-reduce carries the n selected rows only: n d elements
                (all of T in shards)
    embedding   one forward;  head: one backward, and per chunk of tokens the maxima and two sums of its rows

Where the groups of M (or the key-value heads) are fewer than the ranks, one small all-reduce of parameter gradients
comes on top, and for M two of the norm's sums of squares. Sequence parallelism replaces each all-reduce of T by an
all-gather and a reduce-scatter, which together send as much, and adds the gradients of norms and gate, and one more
all-gather where a product's input is needed for the gradient of its weights (M and the MLP). Layers recorded as CUDA
graphs send all gradients of replicated parameters of a graph at once.

Recomputation sends more, which is not counted here: full all of the forward pass once more, selective what has no
product with it, the edges of attention, the gate's numbers and the norm's sums.
"""

import math
from collections import Counter
from dataclasses import dataclass, field

from megatron_taipan.config import ModelConfig
from megatron_taipan.ops.cross_entropy import CHUNK_ELEMENTS
from megatron_taipan.parallel.layout import describe


@dataclass
class Traffic:
    """Calls and payload bytes by collective."""

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, collective: str, n_bytes: int, calls: int = 1) -> None:
        self.calls[collective] += calls
        self.bytes[collective] += n_bytes * calls


def expected_traffic(
    config: ModelConfig, *, tensor: int, sequence: bool, batch: int, length: int, selected: list[int], width: int = 4
) -> Traffic:
    """Traffic of one micro-batch's forward and backward pass, without recomputation.

    Args:
        selected: number of selected tokens of the micro-batch in each S layer.
        width: bytes of an element in the compute precision; 4 for float32.
    """
    t = Traffic()
    if tensor == 1:
        return t
    d = config.d_model
    stream = batch * length * d * width

    def into_block() -> None:
        if sequence:
            t.add("all_gather", stream)
            t.add("reduce_scatter", stream)
        else:
            t.add("all_reduce", stream)  # backward

    def again() -> None:
        if sequence:
            t.add("all_gather", stream)

    def out_of_block() -> None:
        if sequence:
            t.add("reduce_scatter", stream)
            t.add("all_gather", stream)
        else:
            t.add("all_reduce", stream)  # forward

    def norm() -> None:
        if sequence:
            t.add("all_reduce", 4 * d)

    table = describe(config, tensor)
    counts = iter(selected)
    out_of_block()  # the embedding
    for index, letter in enumerate(config.letters):
        shared = [spec for name, spec in table.items() if name.startswith(f"layers.{index}.") and spec.summed]
        if shared:
            t.add("all_reduce", 4 * sum(math.prod(spec.shape) for spec in shared))
        norm()
        into_block()
        if letter == "M":
            if config.mamba.n_groups < tensor:
                t.add("all_reduce", 4 * batch * length * config.mamba.n_groups, calls=2)
            again()
            out_of_block()
            continue
        if letter == "S":
            if sequence:
                t.add("all_reduce", 4 * (2 * d + 2))  # gradients of the gate
                t.add("all_reduce", 4 * batch)  # selected fraction of each row
                t.add("all_gather", batch * length)  # which tokens
                t.add("all_reduce", 4 * 4)  # statistics
            rows = next(counts)
            if sequence:
                out_of_block()
            else:
                t.add("all_reduce", rows * d * width)
        else:
            out_of_block()
        norm()
        into_block()
        again()
        out_of_block()
    norm()
    into_block()  # the head
    tokens = batch * length
    rows_per_chunk = max(1, min(tokens, CHUNK_ELEMENTS // table["embedding.weight"].local_shape(tensor)[0]))
    chunks = -(-tokens // rows_per_chunk)
    t.calls["all_reduce"] += 2 * chunks
    t.bytes["all_reduce"] += 3 * 4 * tokens
    return t
