"""Cross entropy of a linear head by chunks of tokens, its two passes over each chunk's logits in Triton.

As in the reference (and Liger, arXiv 2410.10989), gradients are computed in the forward pass while a chunk's logits
exist. A chunk is large enough for full-speed products; its logits stay in the compute precision, are read once for the
statistics and are then overwritten by their own gradient. Between the two passes a vocabulary-parallel caller
combines the ranks' statistics.
"""

import torch
import triton
import triton.language as tl

from megatron_taipan.ops.cross_entropy import fp16_lift, scale_gradients

CHUNK_ELEMENTS = 1 << 29  # logits per chunk: 1 GiB in 16 bits
BLOCK = 8192


@triton.jit
def _stats_kernel(
    logits_ptr, labels_ptr, top_ptr, sum_ptr, target_ptr, vocab, n_valid, vocab_start, BLOCK: tl.constexpr
):
    """Largest logit, sum of exp(logit - largest), and the label's logit (0 where another rank has it), by row."""
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * vocab
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_valid, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(base + at, mask=at < n_valid, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, x)
        shift = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(top - shift) + tl.exp(x - shift)
        top = new
    largest = tl.max(top, 0)
    tl.store(top_ptr + row, largest)
    tl.store(sum_ptr + row, tl.sum(total * tl.exp(top - largest), 0))
    label = tl.load(labels_ptr + row) - vocab_start
    here = (label >= 0) & (label < n_valid)
    tl.store(target_ptr + row, tl.load(base + tl.where(here, label, 0), mask=here, other=0.0).to(tl.float32))


@triton.jit
def _gradient_kernel(
    logits_ptr, labels_ptr, top_ptr, sum_ptr, weight_ptr, vocab, n_valid, vocab_start, BLOCK: tl.constexpr
):
    """Overwrites a row of logits with weight * (softmax - one-hot)."""
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * vocab
    top = tl.load(top_ptr + row)
    weight = tl.load(weight_ptr + row)
    factor = weight / tl.load(sum_ptr + row)
    label = tl.load(labels_ptr + row) - vocab_start
    for start in range(0, vocab, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(base + at, mask=at < n_valid, other=float("-inf")).to(tl.float32)
        grad = tl.exp(x - top) * factor - tl.where(at == label, weight, 0.0)
        tl.store(base + at, grad.to(logits_ptr.dtype.element_ty), mask=at < vocab)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, token_weights, vocab_start, n_valid, reduce_sum, reduce_max):
        n, v = hidden.shape[0], weight.shape[0]
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        lift = fp16_lift(token_weights, hidden.dtype)
        step = max(1, min(n, CHUNK_ELEMENTS // v))
        for start in range(0, n, step):
            rows = slice(start, min(start + step, n))
            h, scale, label = hidden[rows], token_weights[rows].float().contiguous(), labels[rows].contiguous()
            logits = h @ weight.t()  # [m, v]
            m = logits.shape[0]
            top, norm, target = torch.empty((3, m), dtype=torch.float32, device=h.device)
            _stats_kernel[(m,)](logits, label, top, norm, target, v, n_valid, vocab_start, BLOCK=BLOCK, num_warps=8)
            if reduce_max is not None:
                local, top = top, reduce_max(top).contiguous()
                norm = norm * (local - top).exp()
            if reduce_sum is not None:
                norm, target = reduce_sum(torch.stack([norm, target])).contiguous()
            total += ((norm.log() + top - target) * scale).sum()
            if not (needs_hidden or needs_weight):
                continue
            if lift is not None:
                scale = scale * lift
            _gradient_kernel[(m,)](
                logits, label, top, norm, scale, v, n_valid, vocab_start, BLOCK=BLOCK, num_warps=8
            )  # fmt: skip
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[rows])
            if needs_weight:
                grad_weight = _add_product(grad_weight, logits.t(), h)
        ctx.save_for_backward(grad_hidden, grad_weight, lift)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, upstream):
        grad_hidden, grad_weight, lift = ctx.saved_tensors
        gradients = scale_gradients(upstream, lift, grad_hidden, grad_weight, ctx.weight_dtype)
        return *gradients, None, None, None, None, None, None


def _add_product(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """total + a @ b in float32, the sum over chunks never rounded to 16 bits; added up in place, since torch otherwise
    copies the whole of it first."""
    if a.dtype == torch.float32:
        return a @ b if total is None else total.addmm_(a, b)
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def linear_cross_entropy(
    hidden, weight, labels, token_weights, *, vocab_start=0, n_valid=None, reduce_sum=None, reduce_max=None
):
    """As `linear_cross_entropy_reference`."""
    n_valid = weight.shape[0] if n_valid is None else n_valid
    return _LinearCrossEntropy.apply(
        hidden, weight, labels, token_weights, vocab_start, n_valid, reduce_sum, reduce_max
    )
