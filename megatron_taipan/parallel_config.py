"""Options of how the work is spread over processes."""

from typing import Literal

from megatron_taipan.section import Section, option


class ParallelConfig(Section):
    """How the work is spread; the data-parallel size is the number of processes divided by the other sizes."""

    tensor: int = option(1, "tensor-parallel size", ge=1)
    pipeline: int = option(1, "pipeline-parallel size", ge=1)
    context: int = option(
        1, "context-parallel size: each rank holds one of so many consecutive pieces of every row of data.seq_len", ge=1
    )
    sequence: bool | None = option(
        None,
        "sequence parallelism: norms and residuals on one share of the tokens a tensor rank; null: where tensor divides"
        " data.seq_len, since it is faster and needs less memory",
    )
    overlap: bool = option(
        True,
        "with sequence: tokens are exchanged in chunks, overlapped with the matrix products; between GPUs of one host"
        " through their memory",
    )
    zero_stage: Literal[0, 1, 2, 3] = option(1, "DeepSpeed ZeRO stage")
    offload_optimizer: Literal["none", "cpu", "nvme"] = option(
        "none", "where ZeRO keeps the optimizer state; nvme is refused"
    )
    offload_param: Literal["none", "cpu", "nvme"] = option("none", "where ZeRO-3 keeps parameters; nvme is refused")
    nvme_path: str | None = option(
        None, "kept so that files of earlier runs are read; without effect, since nvme is refused"
    )
    recompute: Literal["none", "selective", "full"] = option(
        "none",
        "activation checkpointing: selective recomputes norms, conv, scan and attention; full recomputes whole layers",
    )
    recompute_every: int = option(1, "with recompute=full: layers per checkpointed segment", ge=1)
    recompute_mixer: list[Literal["conv", "states"]] = option(
        ["states"],
        "with recompute=none: what Mamba-2 layers compute again inside their fused backward pass: [states], most of the"
        " scan's states; [states, conv] also the convolution's output, for less memory still; []: nothing, the fastest",
    )
    timeout_s: float = option(1800.0, "seconds after which a collective that does not finish ends the job", gt=0)

    def piece(self, seq_len: int) -> int:
        """Tokens of a row of seq_len that one rank holds."""
        return seq_len // self.context

    def shards_tokens(self, seq_len: int) -> bool:
        """Whether tensor ranks keep a share of the tokens each, in rows of seq_len tokens."""
        if self.sequence is None:
            return self.tensor > 1 and self.piece(seq_len) % self.tensor == 0
        return self.sequence and self.tensor > 1
