"""silu(gate) * up in Triton: one pass forward, one backward, nothing saved but the inputs."""

import torch
import triton
import triton.language as tl

BLOCK = 2048


@triton.jit
def _forward_kernel(gate_ptr, up_ptr, out_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (g * u / (1 + tl.exp(-g))).to(out_ptr.dtype.element_ty), mask=at < n)


@triton.jit
def _backward_kernel(dout_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, out_ptr, n, AGAIN: tl.constexpr,
                     BLOCK: tl.constexpr):  # fmt: skip
    """AGAIN: the product is written once more, as the forward kernel computes it."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(dout_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    g = tl.load(gate_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    u = tl.load(up_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    s = 1 / (1 + tl.exp(-g))
    tl.store(dgate_ptr + at, (d * u * s * (1 + g * (1 - s))).to(dgate_ptr.dtype.element_ty), mask=at < n)
    tl.store(dup_ptr + at, (d * g * s).to(dup_ptr.dtype.element_ty), mask=at < n)
    if AGAIN:
        tl.store(out_ptr + at, (g * u / (1 + tl.exp(-g))).to(out_ptr.dtype.element_ty), mask=at < n)


@torch.library.custom_op("megatron_taipan::silu_mul_forward", mutates_args=())
def swiglu_forward(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if out.numel():
        _forward_kernel[(triton.cdiv(out.numel(), BLOCK),)](gate, up, out, out.numel(), BLOCK=BLOCK, num_warps=4)
    return out


@swiglu_forward.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.custom_op("megatron_taipan::silu_mul_backward", mutates_args=())
def swiglu_backward(
    dout: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, again: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of gate and up, and the product once more (empty unless again)."""
    dout, gate, up = dout.contiguous(), gate.contiguous(), up.contiguous()
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    out = torch.empty_like(gate) if again else gate.new_empty(0)
    if dout.numel():
        grid = (triton.cdiv(dout.numel(), BLOCK),)
        _backward_kernel[grid](
            dout, gate, up, dgate, dup, out if again else dup, dout.numel(), AGAIN=again, BLOCK=BLOCK, num_warps=4
        )
    return dgate, dup, out


@swiglu_backward.register_fake
def _(dout, gate, up, again):
    return gate.new_empty(gate.shape), up.new_empty(up.shape), gate.new_empty(gate.shape if again else 0)


swiglu_forward.register_autograd(
    lambda ctx, dout: swiglu_backward(dout, *ctx.saved_tensors, False)[:2],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As `silu_mul_reference`."""
    return swiglu_forward(gate, up)
