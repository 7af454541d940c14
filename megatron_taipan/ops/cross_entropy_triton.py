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
BLOCK = 2048  # words a program looks at together, four times of these at once in the first pass


@triton.jit
def _stats_kernel(
    logits_ptr, labels_ptr, top_ptr, sum_ptr, target_ptr, vocab, n_valid, vocab_start, BLOCK: tl.constexpr
):
    """Largest logit, sum of exp(logit - largest), and the label's logit (0 where another rank has it), by row."""
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * vocab
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_valid, 4 * BLOCK):  # so that a sum moves to a new top once for four words
        at = start + tl.arange(0, BLOCK)
        a = tl.load(base + at, mask=at < n_valid, other=float("-inf")).to(tl.float32)
        b = tl.load(base + at + BLOCK, mask=at + BLOCK < n_valid, other=float("-inf")).to(tl.float32)
        c = tl.load(base + at + 2 * BLOCK, mask=at + 2 * BLOCK < n_valid, other=float("-inf")).to(tl.float32)
        d = tl.load(base + at + 3 * BLOCK, mask=at + 3 * BLOCK < n_valid, other=float("-inf")).to(tl.float32)
        new = tl.maximum(top, tl.maximum(tl.maximum(a, b), tl.maximum(c, d)))
        shift = tl.where(new == float("-inf"), 0.0, new)
        four = (tl.exp(a - shift) + tl.exp(b - shift)) + (tl.exp(c - shift) + tl.exp(d - shift))
        total = total * tl.exp(top - shift) + four
        top = new
    largest = tl.max(top, 0)
    tl.store(top_ptr + row, largest)
    moved = tl.where(top == float("-inf"), 0.0, total * tl.exp(top - largest))  # a rank may have padding alone
    tl.store(sum_ptr + row, tl.sum(moved, 0))
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


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, out_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count, other=0.0)
    tl.store(out_ptr + at, (x * tl.load(factor_ptr)).to(out_ptr.dtype.element_ty), mask=at < count)


def scaled(x: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x times factor (0-dim), both float32, rounded once to that type: torch's product into another type is three times
    as slow, and the head's gradient is the largest."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    _scale_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, factor, out, x.numel(), BLOCK=BLOCK, num_warps=4)
    return out


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
        grad_hidden, _ = scale_gradients(upstream, lift, grad_hidden, None, ctx.weight_dtype)
        if grad_weight is not None:
            grad_weight = scaled(grad_weight, (upstream if lift is None else upstream / lift).float(), ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None, None, None


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
