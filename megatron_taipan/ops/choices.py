"""Which implementations a user may choose for an operation, and which of them cannot serve a run, with the reason.

The only place that knows this. What is looked for on the machine (a GPU, a package) is dispatch.py's and the wrappers'.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

from megatron_taipan.errors import UserError
from megatron_taipan.ops.attention_flash import load_flash_attention
from megatron_taipan.ops.attention_sdpa import load_sdpa
from megatron_taipan.ops.causal_conv1d_cuda import load_causal_conv1d_cuda
from megatron_taipan.ops.cross_entropy_cce import load_cut_cross_entropy
from megatron_taipan.ops.cross_entropy_liger import load_liger_cross_entropy
from megatron_taipan.ops.ssd_mamba_ssm import load_mamba_ssm_scan
from megatron_taipan.ops.tiles import fit_tiles

# By option of the configuration's section `ops`: the operations that it decides about (operations.py).
OPTIONS: dict[str, tuple[str, ...]] = {
    "ssd": ("ssd", "ssd_update"),
    "conv": ("causal_conv1d", "conv_update"),
    "attention": ("interval_attention", "decode_attention"),
    "cross_entropy": ("linear_cross_entropy",),
    "norm": ("rms_norm", "add_rms_norm"),
    "gated_norm": ("gated_rms_norm",),
    "rope": ("rotate",),
    "swiglu": ("silu_mul",),
    # used all or none, since they share a form of picked rows
    "selection": ("select_rows", "gather_linear", "bounded_linear", "scatter_rows", "refine"),
    "gate": ("gate_scores",),
}


@dataclass(frozen=True)
class RunFacts:
    """What of a run decides which implementations can serve it; the defaults are served by all."""

    precision: str = "bf16"
    tf32: bool = True
    deterministic: bool = False
    tensor: int = 1  # tensor ranks
    packed: bool = False  # rows hold several documents that must not see each other
    in_pieces: bool = False  # other ranks hold other pieces of the rows
    headdim: int = 64  # of the scan
    d_state: int = 128
    d_conv: int = 4
    conv_channels: int = 8  # on a rank
    conv_elements: int = 0  # of the projections of a micro-batch on a rank, in which the convolution's inputs lie
    scan_elements: int = 0  # of the largest of the scan's tensors there: its inputs, states or products of chunks
    head_dim: int = 128  # of attention
    every_query: dict[str, bool] = field(default_factory=dict)  # layers that attend from all tokens; whether windowed
    gated: tuple[str, ...] = ()  # layers that attend from selected tokens


@dataclass(frozen=True)
class Foreign:
    """An implementation of another project: the operation that it takes over, how it is loaded, what it cannot do."""

    operation: str
    load: Callable[[RunFacts], tuple[Callable, str]]  # the function and its version; raises UserError
    against: Callable[[RunFacts], Iterator[str]]  # reasons why it cannot serve the run
    unrecordable: Callable[[RunFacts], str] = lambda run: ""  # why no CUDA graph can hold it, or ""


def _against_offsets(elements: int, bits: int) -> Iterator[str]:
    """Of a kernel whose offsets in memory have so many bits: beyond, it reads and writes elsewhere, often unseen."""
    if elements > 1 << bits:
        yield (
            f"its offsets take {bits} bits, 2^{bits} = {1 << bits:,} elements, and a micro-batch has {elements:,} on a"
            " rank; raise parallel.context, or lower data.seq_len or train.micro_batch"
        )


def _against_mamba_ssm(run: RunFacts) -> Iterator[str]:
    yield from _against_offsets(run.scan_elements, 31)
    if run.precision == "fp32" and not run.tf32:
        yield "its products of float32 are TF32's, and train.tf32=false"


def _against_causal_conv1d(run: RunFacts) -> Iterator[str]:
    if not 2 <= run.d_conv <= 4:
        yield f"it is of width 2 to 4, not model.mamba.d_conv={run.d_conv}"
    if run.conv_channels % 8:
        yield (
            f"a rank's {run.conv_channels} channels of the convolution are not a multiple of 8"
            f" (remainder {run.conv_channels % 8})"
        )
    yield from _against_offsets(run.conv_elements, 32)


def _needs_every_query(run: RunFacts) -> Iterator[str]:
    if run.gated and not run.every_query:
        yield f"it attends from every token, and layers {', '.join(run.gated)} from selected ones"


def _against_flash_attn(run: RunFacts) -> Iterator[str]:
    yield from _needs_every_query(run)
    if run.precision == "fp32":
        yield "it computes in bf16 and fp16, not train.precision=fp32"
    if run.head_dim > 256:
        yield f"it has heads of up to 256 channels, not {run.head_dim}"


def _against_sdpa(run: RunFacts) -> Iterator[str]:
    yield from _needs_every_query(run)
    windowed = [letter for letter, has_window in run.every_query.items() if has_window]
    if windowed:
        yield f"it has no sliding window, and layers {', '.join(windowed)} have one"
    if run.packed:
        yield (
            "its fast kernels cannot separate documents that are packed into one row; data.one_document=true or"
            " data.mask_documents=false would make each row one document"
        )


def _against_split_vocabulary(run: RunFacts) -> Iterator[str]:
    if run.tensor > 1:
        yield f"the vocabulary is split over parallel.tensor={run.tensor} ranks, and it needs all of it on one"


def _against_cce(run: RunFacts) -> Iterator[str]:
    yield from _against_split_vocabulary(run)
    if run.precision == "fp32":
        yield "its gradients are in bf16 and fp16, not train.precision=fp32"
    if run.deterministic:
        yield "it adds gradients in an order that varies, and train.deterministic=true"


FOREIGN: dict[str, dict[str, Foreign]] = {
    "ssd": {"mamba_ssm": Foreign("ssd", lambda run: load_mamba_ssm_scan(), _against_mamba_ssm)},
    "conv": {"causal_conv1d": Foreign("causal_conv1d", lambda run: load_causal_conv1d_cuda(), _against_causal_conv1d)},
    "attention": {
        "flash_attn": Foreign(
            "causal_attention", lambda run: load_flash_attention(packed=run.packed), _against_flash_attn,
            lambda run: "flash_attn counts packed documents on the host" if run.packed else "",
        ),
        "sdpa": Foreign("causal_attention", lambda run: load_sdpa(), _against_sdpa),
    },
    "cross_entropy": {
        "liger": Foreign(
            "linear_cross_entropy", lambda run: load_liger_cross_entropy(), _against_split_vocabulary
        ),
        "cce": Foreign("linear_cross_entropy", lambda run: load_cut_cross_entropy(), _against_cce),
    },
}  # fmt: skip


def faster_than_ours(run: RunFacts) -> dict[str, str]:
    """By option, the kernels of other projects that `auto` takes on a GPU of compute capability 9.0 or later, where
    they can serve the run: those that were measured to be faster than ours on an H200 (docs/performance.md, "Kernels
    to choose").

    cuDNN's attention has heads of up to 128 channels both ways, and adds gradients in an order that may vary. Pieces of
    rows are attended by our kernel whatever is chosen.
    """
    whole_rows = run.every_query and not run.in_pieces and not any(FOREIGN["attention"]["sdpa"].against(run))
    in_cudnn = run.precision != "fp32" and run.head_dim % 8 == 0 and run.head_dim <= 128
    return {"attention": "sdpa"} if whole_rows and in_cudnn and not run.deterministic else {}


def _against_triton(option: str, run: RunFacts) -> Iterator[str]:
    """Sizes for which our kernels leave an operation to the reference (fast.py), where they were asked for by name."""
    if option == "ssd" and not fit_tiles(run.headdim, run.d_state):
        yield f"it needs powers of two from 16 to 128 for headdim and d_state, not {run.headdim} and {run.d_state}"
    if option == "conv" and run.d_conv > 4:
        yield f"it is of width up to 4, not model.mamba.d_conv={run.d_conv}"
    if option == "attention" and not fit_tiles(run.head_dim):
        yield f"it needs heads of a power of two from 16 to 128 channels, not {run.head_dim}"


def check_choices(choices: Mapping[str, str], run: RunFacts) -> None:
    """Whether what was chosen can serve the run, as far as the configuration decides it; needs no GPU and no package.

    Args:
        choices: by option; options that are not there are "auto".

    Raises:
        UserError: all reasons why not.
    """
    reasons = []
    for option, choice in choices.items():
        if choice in FOREIGN.get(option, {}):
            found = list(FOREIGN[option][choice].against(run))
        else:
            found = list(_against_triton(option, run)) if choice == "triton" else []
        reasons += [f"ops.{option}={choice} cannot serve this run: {reason}" for reason in found]
    if reasons:
        raise UserError(f"{'; '.join(reasons)}. Use auto, or another of `pretrain.py --help`")
