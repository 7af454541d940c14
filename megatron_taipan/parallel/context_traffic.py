"""What context parallelism sends, by formula; compared with what the counter saw in tests and in the benchmark.

Counted is what one rank gives to others, per layer, micro-batch and training step, with b rows of which the rank holds
pieces of l tokens:

    M      all-gather of its state and decay forward, b heads/tp (headdim d_state + 1), of the state's gradient
           backward, b heads/tp headdim d_state, both float32;
           all-to-all of the convolution's tail, b (d_conv - 1) channels, to the next rank, and of its gradient to the
           rank before
    W, S   all-to-all of keys and values, b kv_heads/tp 2 head_dim, of its last tokens that the windows of later pieces
           reach: min(window - 1, l) for the next rank, and where the window is longer than a piece more ranks further
           on; backward gradients of as many as it was given
    A      the same, of all its tokens to every rank behind it
    S      besides, all-reduce of the share that each row's gate selected, b float32, each way

None of it depends on the length of the rows but A's. Ranks send different amounts: the last has nobody behind it and
sends no keys forward, the first no gradients backward. Recomputation, selective or full, sends all of the forward pass
again.
"""

from megatron_taipan.config import Config
from megatron_taipan.layer_kinds.registry import kind_of
from megatron_taipan.model_config import ModelConfig
from megatron_taipan.parallel.context import ContextParallel
from megatron_taipan.parallel.traffic import Traffic


class PieceTraffic(Traffic):
    """Adds up what layers of one rank send in one micro-batch's forward and backward pass."""

    def __init__(
        self,
        config: ModelConfig,
        place: ContextParallel,
        *,
        tensor: int,
        batch: int,
        length: int,
        width: int,
        forward: int,
    ):
        super().__init__()
        self.config, self.place, self.tensor = config, place, tensor
        self.batch, self.length, self.width, self.forward = batch, length, width, forward

    def tokens_before(self, elements: int, window: int | None) -> None:
        """Every token's last `window` tokens, itself among them, with so many elements each."""
        ranks, own, length = range(self.place.size), self.place.rank, self.length
        reach, size = self.place.reach(length, window), self.batch * elements * self.width
        to_others = sum(self.place.overlap(own, rank, length, reach) for rank in ranks)
        from_others = sum(self.place.overlap(rank, own, length, reach) for rank in ranks)
        self.add("all_to_all", size * to_others, self.forward)
        self.add("all_to_all", size * from_others)  # backward

    def entering_state(self, heads: int, elements: int) -> None:
        """A state of so many elements and a decay for each head, in float32."""
        width = max(4, self.width)
        self.add("all_gather", self.batch * heads * (elements + 1) * width, self.forward)
        self.add("all_gather", self.batch * heads * elements * width)  # backward

    def share_of_rows(self, *, learned: bool) -> None:
        """One float32 number of each row, summed over the pieces; `learned`: it has a gradient."""
        self.add("all_reduce", 4 * self.batch, self.forward + learned)


def expected_piece_traffic(
    config: ModelConfig,
    *,
    context: int,
    rank: int,
    batch: int,
    length: int,
    tensor: int = 1,
    width: int = 4,
    recompute: bool = False,
) -> Traffic:
    """What one of `context` ranks sends to the others in one micro-batch's forward and backward pass.

    Args:
        length: tokens of a whole row.
        width: bytes of an element in the compute precision; 4 for float32.
        recompute: the forward pass runs again during the backward pass.
    """
    sent = PieceTraffic(
        config, ContextParallel(context, rank, None), tensor=tensor, batch=batch, length=length // context,
        width=width, forward=2 if recompute else 1,
    )  # fmt: skip
    for letter in config.letters:
        pieces = kind_of(letter).pieces
        assert pieces is not None, f"{letter} needs whole rows"  # refused by engine/build.py:check_pieces
        pieces(sent)
    return sent


def bytes_per_step(config: Config, rank: int, micro_batches: int) -> Traffic:
    """What a rank of a run sends to other pieces in a training step of so many micro-batches."""
    p, t = config.parallel, config.train
    one = expected_piece_traffic(
        config.model, context=p.context, rank=rank, batch=t.micro_batch, length=config.data.seq_len, tensor=p.tensor,
        width=4 if t.precision == "fp32" else 2, recompute=p.recompute != "none",
    )  # fmt: skip
    for counts in (one.calls, one.bytes):
        for collective in counts:
            counts[collective] *= micro_batches
    return one


def describe_pieces(config: Config, micro_batches: int) -> str:
    """A line about the pieces of a run's rows and the bytes that the rank with most of them sends in a step."""
    context, length = config.parallel.context, config.data.seq_len
    by_rank = [bytes_per_step(config, rank, micro_batches) for rank in range(context)]
    most = max(by_rank, key=lambda sent: sent.bytes.total())
    parts = ", ".join(f"{name} {n / 1e6:,.2f} MB" for name, n in sorted(most.bytes.items()))
    return (
        f"rows of {length:,} tokens in {context} pieces of {config.parallel.piece(length):,}; a rank sends at most"
        f" {most.bytes.total() / 1e6:,.2f} MB a step to the ranks with the other pieces ({parts}), in"
        f" {most.calls.total():,} calls"
    )
