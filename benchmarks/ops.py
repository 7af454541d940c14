"""`python -m benchmarks ops`: each operation by each implementation that can be chosen, one table.

Sizes are the 1.3B preset's: 4 x 4096 tokens, width 2048, bf16. What is not installed or cannot do a row's work is a row
that says so. `mixer` is all of an M layer between its projections: ours fused, or part by part with other projects'.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.common import Table, add_out, median_ms
from megatron_taipan.errors import UserError
from megatron_taipan.ops.choices import FOREIGN, RunFacts
from megatron_taipan.ops.dispatch import pick_ops
from megatron_taipan.ops.operations import Ops

HEADS, HEADDIM, D_STATE, WIDTH = 64, 64, 128, 4  # of the scan and the convolution
ATTENTION_HEADS, HEAD_DIM, WINDOW = 16, 128, 2048
D_MODEL, VOCAB = 2048, 128_256
DEVICE = "cuda"

# (operands that want gradients, function of the operations and of them)
Work = tuple[list[torch.Tensor], Callable[..., torch.Tensor]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `run` takes."""
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--length", type=int, default=4096, help="tokens a row")
    parser.add_argument("--documents", type=int, default=8, help="documents a row, where they are packed")
    parser.add_argument("--only", nargs="*", help="rows whose names hold these words")
    parser.add_argument("--reference", action="store_true", help="plain torch as well, which is slow")
    add_out(parser)


def run(options: argparse.Namespace) -> None:
    table = Table("ops", options.out)
    for operation, facts, choices, work in rows(options):
        timed: dict[str, float] = {}
        for name, choice in choices:
            what = f"{operation}, {name}"
            if options.only and not any(word in what for word in options.only):
                continue
            table.attempt(what, partial(measure, choice, facts, work))
            if ms := table.rows[-1].get("forward+backward ms"):
                timed[name] = ms
        if len(timed) > 1:
            best = min(timed, key=lambda name: timed[name])
            table.add(
                f"{operation}: fastest", choice=best, triton_over_it=round(timed.get("triton", 0) / timed[best], 3)
            )


def measure(choices: dict[str, str], facts: RunFacts, work: Callable[[], Work]) -> dict[str, Any]:
    """Milliseconds; or why the implementation does not run."""
    try:
        ops = pick_ops("fast", choices, facts)
    except UserError as error:
        return {"skipped": str(error)}
    inputs, compute = work()
    grad = torch.randn_like(compute(ops, *inputs))

    def both() -> None:
        for operand in inputs:
            operand.grad = None
        compute(ops, *inputs).backward(grad)

    forward = median_ms(lambda: compute(ops, *inputs))
    return {"forward ms": round(forward, 3), "forward+backward ms": round(median_ms(both), 3)}


def rows(options: argparse.Namespace) -> Iterator[tuple[str, RunFacts, list[tuple[str, dict]], Callable[[], Work]]]:
    """(operation, what it must do, (name, choices) by implementation, what makes its work)."""
    b, l = options.batch, options.length
    own = ["triton", "reference"] if options.reference else ["triton"]

    def choices(option: str) -> list[tuple[str, dict]]:
        return [(choice, {option: choice}) for choice in (*own, *FOREIGN[option])]

    for packed in (False, True):
        kind = f"{options.documents} documents a row" if packed else "whole rows"
        starts = document_starts(b, l, options.documents if packed else 1)
        facts = RunFacts(packed=packed, conv_channels=HEADS * HEADDIM + 2 * D_STATE)
        yield f"ssd, {kind}", facts, choices("ssd"), partial(scan_work, starts)
        yield f"conv, {kind}", facts, choices("conv"), partial(conv_work, starts)
        parts = [
            ("triton", {}),
            ("causal_conv1d and mamba_ssm", {"conv": "causal_conv1d", "ssd": "mamba_ssm"}),
            ("triton and mamba_ssm", {"ssd": "mamba_ssm"}),
            ("causal_conv1d and triton", {"conv": "causal_conv1d"}),
        ]
        yield f"mixer, {kind}", facts, parts, partial(mixer_work, starts)
        for letter, window in (("A", None), ("W", WINDOW)):
            facts = RunFacts(packed=packed, every_query={letter: window is not None})
            work = partial(attention_work, starts, window)
            yield f"attention {letter}, {kind}", facts, choices("attention"), work
    turned = [("triton", {}), ("reference", {"rope": "reference"})]
    yield "rope of queries or keys", RunFacts(), turned, partial(rope_work, b * l)
    yield "cross_entropy", RunFacts(), choices("cross_entropy"), partial(cross_entropy_work, b * l)


def document_starts(b: int, l: int, documents: int) -> torch.Tensor:
    """[b, l]: where each token's document begins in its row, documents of equal length."""
    size = -(-l // documents)
    return (torch.arange(l, device=DEVICE) // size * size).expand(b, l).contiguous()


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype).requires_grad_()


def numbers(starts: torch.Tensor) -> torch.Tensor:
    """seq_idx [b, l] int32 of documents that begin there."""
    return (starts == torch.arange(starts.shape[1], device=DEVICE)).cumsum(1).int() - 1


def scan_work(starts: torch.Tensor) -> Work:
    b, l = starts.shape
    wide = torch.float32
    inputs = [
        tensor(b, l, HEADS, HEADDIM), tensor(b, l, HEADS, dtype=wide), tensor(HEADS, dtype=wide),
        tensor(b, l, 1, D_STATE), tensor(b, l, 1, D_STATE), tensor(HEADS, dtype=wide),
    ]  # fmt: skip
    steps = inputs[1].detach().sigmoid().mul(0.1).requires_grad_()
    inputs[1], inputs[2] = steps, (-inputs[2].detach().exp()).requires_grad_()
    seq_idx = numbers(starts)

    def compute(ops: Ops, x, dt, A, B, C, D) -> torch.Tensor:
        return ops.ssd(x, dt, A, B, C, chunk_size=256, D=D, seq_idx=seq_idx)

    return inputs, compute


def conv_work(starts: torch.Tensor) -> Work:
    channels = HEADS * HEADDIM + 2 * D_STATE
    seq_idx = numbers(starts)

    def compute(ops: Ops, x, weight, bias) -> torch.Tensor:
        return ops.causal_conv1d(x, weight, bias, seq_idx=seq_idx)

    return [tensor(*starts.shape, channels), tensor(channels, WIDTH, scale=0.4), tensor(channels)], compute


def mixer_work(starts: torch.Tensor) -> Work:
    """The mixer with its projections, since only there its parts meet; they are the same in every row."""
    from megatron_taipan.gate_config import GateConfig
    from megatron_taipan.model.context import make_context
    from megatron_taipan.model.gate_settings import settled
    from megatron_taipan.model.stream import Stream
    from megatron_taipan.model.taipan import Taipan
    from megatron_taipan.model_config import ModelConfig

    config = ModelConfig(pattern="M", vocab_size=64, d_model=D_MODEL, d_ff=64)
    seq_idx = numbers(starts)
    made: dict[int, Any] = {}

    def compute(ops: Ops, x) -> torch.Tensor:
        if id(ops) not in made:
            with torch.device(DEVICE):
                alone = replace(ops, add_norm_linear=None)  # without the norm that may be fused with it
                made[id(ops)] = Taipan(config, ops=alone).bfloat16().layers[0].mixer
        ctx = make_context(seq_idx, seq_idx, None, 0, settled(GateConfig()))
        return made[id(ops)](Stream(x), lambda h, *_: (h, h), ctx).branch

    return [tensor(*starts.shape, D_MODEL)], compute


def attention_work(starts: torch.Tensor, window: int | None) -> Work:
    b, l = starts.shape
    place, row = torch.arange(l, device=DEVICE), torch.arange(b, device=DEVICE)[:, None] * l
    lowest = starts if window is None else torch.maximum(starts, place - window + 1)
    lo, hi = (row + lowest).flatten().int(), (row + place).flatten().int()

    def compute(ops: Ops, q, k, v) -> torch.Tensor:
        if ops.causal_attention is not None:
            return ops.causal_attention(q, k, v, starts, window)
        return ops.interval_attention(q, k, v, lo, hi)

    return [tensor(b * l, ATTENTION_HEADS, HEAD_DIM) for _ in range(3)], compute


def rope_work(n: int) -> Work:
    from megatron_taipan.ops.rope import rotary_tables

    position = torch.arange(n, device=DEVICE)

    def compute(ops: Ops, x) -> torch.Tensor:
        return ops.rotate(x, *rotary_tables(position, HEAD_DIM, 5e5, x.dtype))

    return [tensor(n, ATTENTION_HEADS, HEAD_DIM)], compute


def cross_entropy_work(n: int) -> Work:
    labels = torch.randint(0, VOCAB, (n,), device=DEVICE)
    weights = torch.full((n,), 1 / n, device=DEVICE)

    def compute(ops: Ops, hidden, weight) -> torch.Tensor:
        return ops.linear_cross_entropy(hidden, weight, labels, weights, n_valid=VOCAB)

    return [tensor(n, D_MODEL), tensor(VOCAB, D_MODEL, scale=0.02)], compute
