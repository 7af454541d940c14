"""Options of which implementation runs, one for each operation; ops/choices.py says what each choice needs."""

from typing import Literal

from megatron_taipan.section import Section, option

OwnKernel = Literal["auto", "triton", "reference"]


class OpsConfig(Section):
    """Which implementation of each operation runs; in all options but the first, auto means: as ops.backend says, and
    for layers A what the option of attention adds."""

    backend: Literal["auto", "reference", "fast"] = option(
        "auto",
        "default of the other options; auto: this project's kernels where they run; reference: plain torch; fast:"
        " refuse to start without kernels",
    )
    ssd: Literal["auto", "triton", "mamba_ssm", "reference"] = option(
        "auto", "the scan of M layers; mamba_ssm: its scan alone, between our convolution and norm"
    )
    conv: Literal["auto", "triton", "causal_conv1d", "reference"] = option("auto", "the short convolution of M layers")
    attention: Literal["auto", "triton", "flash_attn", "sdpa", "reference"] = option(
        "auto",
        "attention; flash_attn and sdpa (torch's, cuDNN's kernel first) for layers W and A, never for the selected"
        " queries of S; sdpa for A with one document a row, and auto's choice there",
    )
    cross_entropy: Literal["auto", "triton", "liger", "cce", "reference"] = option(
        "auto", "head and cross entropy; liger: its fused linear cross entropy; cce: cut-cross-entropy"
    )
    norm: OwnKernel = option("auto", "norms of the residual stream and the additions to it")
    gated_norm: OwnKernel = option("auto", "the gated norm of M layers")
    rope: OwnKernel = option("auto", "the rotary embedding of A layers")
    swiglu: OwnKernel = option("auto", "the product inside SwiGLU")
    selection: OwnKernel = option(
        "auto",
        "picking the tokens that attend in S layers, and putting them back; as kernels also all queries of gradient=all"
        " in one call",
    )
    gate: OwnKernel = option("auto", "logits and noise of the gate of S layers")

    def choices(self) -> dict[str, str]:
        """What each option but `backend` says."""
        return self.model_dump(exclude={"backend"})
