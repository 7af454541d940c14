"""Interval attention in Triton: query i attends the keys lo[i]..hi[i], both ends included.

Because lo and hi never fall along the queries, a block of queries needs one contiguous range of keys and a block of
keys is needed by one contiguous range of queries: no block lists, nothing read by the host.

Four launches (kernels in interval_attention_kernels.py):
    forward   one program per block of queries and head; keeps the log-sum-exp of each row
    dq        one program per block of queries and head; also writes delta = rowsum(o * do)
    ranges    the range of queries of each block of keys
    dk, dv    one program per block of keys and key head, over all query heads of its group

No program writes what another one reads or writes, so results are deterministic. Blocks of padding alone write their
zeros and end.
"""

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_taipan.ops.interval_attention_kernels import dkv_kernel, dq_kernel, forward_kernel, ranges_kernel
from megatron_taipan.ops.tiles import fit_tiles

LOG2E = 1.4426950408889634
FAR = 2**30  # beyond every key
QUANTUM = 512  # keys; see _tile_order


def launch_options(kernel: str, dtype: torch.dtype, head_dim: int) -> dict[str, int]:
    """Block sizes and launch parameters, measured on an H100 (docs/lab-notes.md); float32 tiles must be smaller.

    All of them leave room for two programs on a multiprocessor, so that one's softmax overlaps the other's products.
    """
    if dtype == torch.float32:
        return {"BLOCK_Q": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2 if head_dim <= 64 else 1}
    table = {
        "forward": {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
        "dq": {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
        "dkv": {"BLOCK_Q": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
    }
    return table[kernel]


def _precision(dtype: torch.dtype) -> str:
    """How Triton multiplies float32 tiles: exactly, unless the user allowed TF32 products."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


def _tiles(x: torch.Tensor, rows: int) -> TensorDescriptor:
    """x [n, h, d] as tiles of `rows` tokens of one head, moved by the copy engine; reads past the end give zeros."""
    n, h, d = x.shape
    return TensorDescriptor(x, [n, h * d], [x.stride(0), 1], [rows, d])


def _tileable(x: torch.Tensor) -> torch.Tensor:
    """x [n, h, d], copied where its heads are not side by side, or its rows not apart or not aligned to 16 bytes."""
    _, h, d = x.shape
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) * x.element_size() % 16 == 0
    apart = x.stride(0) >= h * d  # CUDA's documentation of tensor maps has no rows that share memory
    # a clone, since what lies behind an unaligned address may be contiguous as it is
    readable = aligned and apart and x.stride(2) == 1 and x.stride(1) == d
    return x if readable else x.clone(memory_format=torch.contiguous_format)


@torch.library.custom_op("megatron_taipan::interval_attention_forward", mutates_args=())
def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o [nq, hq, d], log-sum-exp in base 2 [hq, nq] float32)."""
    q, k, v = _tileable(q), _tileable(k), _tileable(v)
    nq, hq, d = q.shape
    hk = k.shape[1]
    o = torch.empty((nq, hq, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((hq, nq), dtype=torch.float32, device=q.device)
    if nq:
        options = launch_options("forward", q.dtype, d)
        forward_kernel[(triton.cdiv(nq, options["BLOCK_Q"]), hq)](
            q, _tiles(k, options["BLOCK_K"]), _tiles(v, options["BLOCK_K"]), o, lse, lo, hi, nq, q.stride(0),
            q.stride(1), o.stride(0), o.stride(1), LOG2E / d**0.5, GROUP=hq // hk, D=d, QUANTUM=QUANTUM,
            PRECISION=_precision(q.dtype), FAR=FAR, **options,
        )  # fmt: skip
    return o, lse


@attention_forward.register_fake
def _(q, k, v, lo, hi):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("megatron_taipan::interval_attention_backward", mutates_args=())
def attention_backward(
    do: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor, lse: torch.Tensor,
    lo: torch.Tensor, hi: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(dq, dk, dv)."""
    if not q.shape[0]:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    do, q, k, v = _tileable(do), _tileable(q), _tileable(k), _tileable(v)
    nq, hq, d = q.shape
    nk, hk, _ = k.shape
    dq = torch.empty((nq, hq, d), dtype=q.dtype, device=q.device)
    dk = torch.empty((nk, hk, d), dtype=k.dtype, device=k.device)
    dv = torch.empty((nk, hk, d), dtype=v.dtype, device=v.device)
    delta = torch.empty_like(lse)
    shared = {"GROUP": hq // hk, "D": d, "PRECISION": _precision(q.dtype), "FAR": FAR}
    scales = d**-0.5, LOG2E / d**0.5

    options = launch_options("dq", q.dtype, d)
    dq_kernel[(triton.cdiv(nq, options["BLOCK_Q"]), hq)](
        q, _tiles(k, options["BLOCK_K"]), _tiles(v, options["BLOCK_K"]), o, do, lse, delta, dq, lo, hi, nq,
        q.stride(0), q.stride(1), o.stride(0), o.stride(1), do.stride(0), do.stride(1), dq.stride(0), dq.stride(1),
        *scales, QUANTUM=QUANTUM, **shared, **options,
    )  # fmt: skip

    options = launch_options("dkv", q.dtype, d)
    block_q, block_k = options["BLOCK_Q"], options["BLOCK_K"]
    blocks = triton.cdiv(nk, block_k)
    ranges = torch.empty(2 * blocks, dtype=torch.int32, device=q.device)
    ranges_kernel[(triton.cdiv(blocks, 64),)](
        lo, hi, ranges, nq, nk, blocks, nq.bit_length(), BLOCK_K=block_k, BLOCK=64, num_warps=2
    )
    dkv_kernel[(blocks, hk)](
        _tiles(q, block_q), _tiles(k, block_k), _tiles(v, block_k), _tiles(do, block_q), lse, delta, dk, dv, lo, hi,
        ranges, nq, nk, dk.stride(0), dk.stride(1), *scales, **shared, **options,
    )  # fmt: skip
    return dq, dk, dv


@attention_backward.register_fake
def _(do, q, k, v, o, lse, lo, hi):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:])


def _backward(ctx, do, _dlse):
    q, k, v, o, lse, lo, hi = ctx.saved_tensors
    return *attention_backward(do, q, k, v, o, lse, lo, hi), None, None


attention_forward.register_autograd(_backward, setup_context=_save)


def supports(q: torch.Tensor, k: torch.Tensor) -> bool:
    """Whether the kernels take these tensors: a head size that fits tiles, floating point up to 32 bits."""
    return q.dtype in (torch.bfloat16, torch.float16, torch.float32) and fit_tiles(q.shape[-1])


def interval_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lo: torch.Tensor, hi: torch.Tensor
) -> torch.Tensor:
    """Attention of query i over the keys lo[i]..hi[i], scale 1/sqrt(d).

    Args:
        q: [nq, hq, d]; k, v: [nk, hk, d] with hq a multiple of hk (grouped-query attention).
        lo, hi: [nq] int32, 0 <= lo <= hi < nk, both non-decreasing. Rows with lo > hi may follow at the end: the
            padding of a buffer of fixed capacity. They see no key; their output and gradients are 0. Their q and the
            gradients that arrive for them must be finite in the first 64 such rows and may be anything beyond.

    Returns:
        o [nq, hq, d], of q's dtype; softmax and sums are float32.
    """
    return attention_forward(q, k, v, lo.contiguous(), hi.contiguous())[0]
