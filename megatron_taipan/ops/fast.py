"""The kernels by operation: where they are and which cases they leave to the reference.

Each loader imports its kernel, so that an ImportError (no Triton here) means: the reference runs.
"""

from collections.abc import Callable

from megatron_taipan.ops.causal_conv1d import causal_conv1d_reference
from megatron_taipan.ops.decode import conv_update_reference
from megatron_taipan.ops.interval_attention import interval_attention_reference
from megatron_taipan.ops.norms import gated_rms_norm_reference
from megatron_taipan.ops.ssd import ssd_reference
from megatron_taipan.ops.tiles import fit_tiles


def load_ssd() -> Callable:
    """Head and state sizes that are powers of two from 16 to 128."""
    from megatron_taipan.ops.ssd_triton import ssd

    def run(x, dt, A, B, C, **options):
        return (ssd if fit_tiles(x.shape[-1], B.shape[-1]) else ssd_reference)(x, dt, A, B, C, **options)

    return run


def load_causal_conv1d() -> Callable:
    """Widths 2 to 4; a tail that wants a gradient goes to the reference."""
    from megatron_taipan.ops.causal_conv1d_triton import MAX_WIDTH, causal_conv1d

    def run(x, weight, bias=None, *, initial_tail=None, **options):
        wants = initial_tail is not None and initial_tail.requires_grad
        kernel = causal_conv1d_reference if wants or weight.shape[1] > MAX_WIDTH else causal_conv1d
        return kernel(x, weight, bias, initial_tail=initial_tail, **options)

    return run


def load_rms_norm() -> Callable:
    from megatron_taipan.ops.rms_norm_triton import rms_norm

    return rms_norm


def load_add_rms_norm() -> Callable:
    from megatron_taipan.ops.rms_norm_triton import add_rms_norm

    return add_rms_norm


def load_gated_rms_norm() -> Callable:
    """Groups that are on one rank, or of which several ranks each have a part."""
    from megatron_taipan.ops.gated_norm_triton import gated_rms_norm

    def run(y, z, weight, *, eps, group_size, reduce_sum=None):
        whole = y.shape[-1] % group_size == 0 or reduce_sum is not None
        kernel = gated_rms_norm if whole else gated_rms_norm_reference
        return kernel(y, z, weight, eps=eps, group_size=group_size, reduce_sum=reduce_sum)

    return run


def load_interval_attention() -> Callable:
    """Head sizes that are powers of two from 16 to 128."""
    from megatron_taipan.ops.interval_attention_triton import interval_attention, supports

    def run(q, k, v, lo, hi):
        return (interval_attention if supports(q, k) else interval_attention_reference)(q, k, v, lo.int(), hi.int())

    return run


def load_linear_cross_entropy() -> Callable:
    from megatron_taipan.ops.cross_entropy_triton import linear_cross_entropy

    return linear_cross_entropy


def load_rotate() -> Callable:
    from megatron_taipan.ops.rope_triton import rotate

    return rotate


def load_silu_mul() -> Callable:
    from megatron_taipan.ops.swiglu_triton import silu_mul

    return silu_mul


def load_refine() -> Callable:
    from megatron_taipan.ops.refine_triton import refine

    return refine


def load_selected_rows(name: str) -> Callable[[], Callable]:
    """The loader of one operation on selected rows; they are used all or none, since they share the form of `Rows`."""

    def load() -> Callable:
        from megatron_taipan.ops.selected_rows_triton import bounded_linear, gather_linear, scatter_rows, select_rows

        return {f.__name__: f for f in (bounded_linear, gather_linear, scatter_rows, select_rows)}[name]

    return load


def load_decode_attention() -> Callable:
    from megatron_taipan.ops.decode_triton import decode_attention

    return decode_attention


def load_conv_update() -> Callable:
    """Widths 2 to 4."""
    from megatron_taipan.ops.decode_triton import conv_update

    def run(tail, x, weight, bias=None):
        return (conv_update if 2 <= weight.shape[1] <= 4 else conv_update_reference)(tail, x, weight, bias)

    return run


def load_ssd_update() -> Callable:
    from megatron_taipan.ops.decode_triton import ssd_update

    return ssd_update


def load_mamba2_mix() -> Callable:
    from megatron_taipan.ops.mamba2_triton import mamba2_mix

    return mamba2_mix


def load_every_query() -> Callable:
    from megatron_taipan.ops.every_query_triton import every_query

    return every_query


def load_gate_scores() -> Callable:
    from megatron_taipan.ops.gate_scores_triton import gate_scores

    return gate_scores


def load_add_norm_linear() -> Callable:
    from megatron_taipan.ops.norm_linear_triton import add_norm_linear

    return add_norm_linear


def load_add_norm_swiglu() -> Callable:
    from megatron_taipan.ops.norm_linear_triton import add_norm_swiglu

    return add_norm_swiglu


SELECTED_ROWS = ("select_rows", "gather_linear", "bounded_linear", "scatter_rows")

KERNELS: dict[str, tuple[str, Callable[[], Callable]]] = {
    "ssd": ("triton", load_ssd),
    "causal_conv1d": ("triton", load_causal_conv1d),
    "rms_norm": ("triton", load_rms_norm),
    "add_rms_norm": ("triton", load_add_rms_norm),
    "gated_rms_norm": ("triton", load_gated_rms_norm),
    "interval_attention": ("triton", load_interval_attention),
    "linear_cross_entropy": ("triton", load_linear_cross_entropy),
    "rotate": ("triton", load_rotate),
    "silu_mul": ("triton", load_silu_mul),
    **{name: ("triton", load_selected_rows(name)) for name in SELECTED_ROWS},
    "refine": ("triton", load_refine),
    "gate_scores": ("triton", load_gate_scores),
    "decode_attention": ("triton", load_decode_attention),
    "conv_update": ("triton", load_conv_update),
    "ssd_update": ("triton", load_ssd_update),
}

# Several operations as one, by name: (loader, the operations that it takes the place of where all of them are ours).
FUSIONS: dict[str, tuple[Callable[[], Callable], tuple[str, ...]]] = {
    "mamba2_mix": (load_mamba2_mix, ("causal_conv1d", "ssd", "gated_rms_norm")),
    "add_norm_linear": (load_add_norm_linear, ("add_rms_norm",)),  # and a product
    "add_norm_swiglu": (load_add_norm_swiglu, ("add_rms_norm", "silu_mul")),  # and three products
    "every_query": (load_every_query, ("interval_attention", *SELECTED_ROWS)),  # of every token, where few learn
}
