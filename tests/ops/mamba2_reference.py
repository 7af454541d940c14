"""What the fused Mamba-2 kernels compute, in the references of their parts."""

import torch.nn.functional as F

from megatron_taipan.ops.causal_conv1d import causal_conv1d_reference
from megatron_taipan.ops.norms import gated_rms_norm_reference
from megatron_taipan.ops.ssd import ssd_reference


def mix_reference(zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, *, seq_idx, headdim, groups, d_state):
    """conv, scan and gated norm one after the other."""
    b, l, _ = zxbcdt.shape
    heads, states = len(A), groups * d_state
    inner = heads * headdim
    z, xBC, dt = zxbcdt.split([inner, inner + 2 * states, heads], -1)
    x, B, C = causal_conv1d_reference(xBC, conv_weight, conv_bias, seq_idx=seq_idx).split([inner, states, states], -1)
    y = ssd_reference(
        x.view(b, l, heads, headdim), F.softplus(dt + dt_bias), A, B.view(b, l, groups, d_state),
        C.view(b, l, groups, d_state), chunk_size=64, D=D, seq_idx=seq_idx,
    )  # fmt: skip
    return gated_rms_norm_reference(y.flatten(2), z, norm_weight, eps=1e-5, group_size=inner // groups)


def kept_and_projected(*inputs, **options):
    """The fused mixer that keeps everything, then by torch the output projection, the last input."""
    from megatron_taipan.ops.mamba2_triton import mamba2_mix

    *inputs, out_weight = inputs
    return F.linear(mamba2_mix(*inputs, **options), out_weight)


def mixed_again(*inputs, recompute, **options):
    """The same as one operation, which computes again what `recompute` says."""
    from megatron_taipan.ops.mamba2_triton import mamba2_mix

    *inputs, out_weight = inputs
    return mamba2_mix(*inputs, out_weight=out_weight, recompute=recompute, **options)
