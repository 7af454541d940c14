"""The SSD scan by mamba_ssm's Triton kernels (`mamba_chunk_scan_combined`).

The scan alone, between our convolution and our gated norm: so the norm may span tensor ranks, which mamba_ssm's own
fused layer does not know.
"""

from collections.abc import Callable

from torch import Tensor

from megatron_taipan.ops.libraries import load_library


def load_mamba_ssm_scan() -> tuple[Callable, str]:
    """`ssd` with the arguments of `ssd_reference`, and mamba_ssm's version.

    Raises:
        UserError: mamba_ssm cannot be used here.
    """
    module, version = load_library("mamba_ssm", "mamba_ssm.ops.triton.ssd_combined", "ssd")
    scan = module.mamba_chunk_scan_combined

    def ssd(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, chunk_size: int, D: Tensor | None = None,
        seq_idx: Tensor | None = None, initial_state: Tensor | None = None, return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
        if seq_idx is not None:
            # There the state before the first token belongs to document 0, here to the first token's document.
            seq_idx = (seq_idx if initial_state is None else seq_idx - seq_idx[:, :1]).int().contiguous()
        return scan(
            x, dt, A, B, C, chunk_size, D=D, z=None, dt_bias=None, initial_states=initial_state, seq_idx=seq_idx,
            dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=return_state,
        )  # fmt: skip

    return ssd, version
