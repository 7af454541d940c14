"""Stand-ins for other projects' packages: their functions' real signatures, computed slowly in plain torch.

What they accept is as narrow as what the real ones accept (types, layouts), so that a wrapper which hands over
something else fails here and not on a GPU. Written from the sources of mamba-ssm 2.3.2.post1, causal-conv1d 1.7.0,
flash-attn 2.8.3.post2, liger-kernel 0.8.5 and cut-cross-entropy 25.1.1.
"""

import sys
from importlib import metadata
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

VERSIONS = {
    "mamba-ssm": "2.3.2.post1", "causal-conv1d": "1.7.0", "flash-attn": "2.8.3.post2", "liger-kernel": "0.8.5",
    "cut-cross-entropy": "25.1.1",
}  # fmt: skip


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False, return_varlen_states=False,
):  # fmt: skip
    """The recurrence, token by token. The initial state belongs to document 0, whatever the first token's is."""
    b, l, h, p = x.shape
    assert z is None and dt_bias is None and not dt_softplus and A.shape == (h,) and dt.shape == (b, l, h)
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.is_contiguous())
    B, C = (t.repeat_interleave(h // B.shape[2], 2) for t in (B, C))  # [b, l, h, n]
    state = x.new_zeros(b, h, p, B.shape[-1]) if initial_states is None else initial_states
    document = torch.zeros(b, dtype=torch.int32)
    ys = []
    for t in range(l):
        if seq_idx is not None:
            state = torch.where((seq_idx[:, t] == document)[:, None, None, None], state, 0)
            document = seq_idx[:, t]
        decay = (dt[:, t] * A).exp()[..., None, None]
        state = state * decay + (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None]
        ys.append((state * C[:, t, :, None]).sum(-1) + (0 if D is None else D[:, None] * x[:, t]))
    y = torch.stack(ys, 1)
    return (y, state) if return_final_states else y


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None,
    activation=None,
):  # fmt: skip
    """x: [b, c, l], channels last where documents or inputs before it are given."""
    b, c, l = x.shape
    width = weight.shape[1]
    assert x.stride(1) == 1 and c % 8 == 0 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0 and 2 <= width <= 4
    assert x.data_ptr() % 16 == 0  # it loads 16 bytes at once
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.is_contiguous())
    assert initial_states is None or (seq_idx is None and initial_states.stride(1) == 1)
    assert activation == "silu" and not return_final_states and (bias is None or bias.dtype == weight.dtype)
    before = x.new_zeros(b, c, width - 1) if initial_states is None else initial_states
    padded = torch.cat([before, x], 2)
    y = torch.zeros_like(x) if bias is None else bias[:, None].expand_as(x)
    for k in range(width):
        back = width - 1 - k
        part = padded[:, :, k : k + l]
        if seq_idx is not None:
            same = torch.cat([seq_idx[:, :back] * 0 - 1, seq_idx[:, : l - back]], 1) == seq_idx
            part = part * same[:, None]
        y = y + part * weight[:, k, None]
    return F.silu(y)


def _attend(q, k, v, left: int) -> Tensor:
    """One document: q [l, hq, d], k and v [l, hk, d]; `left` keys before each token, or -1: all."""
    l = len(q)
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    at = torch.arange(l)
    visible = (at <= at[:, None]) & ((at >= at[:, None] - left) if left >= 0 else True)
    scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~visible, float("-inf")).softmax(-1), v)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    """q: [b, l, hq, d]."""
    assert causal and q.dim() == 4 and softmax_scale is None and window_size[1] in (-1, 0)
    return torch.stack([_attend(*row, window_size[0]) for row in zip(q, k, v, strict=True)])


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """q: [tokens, hq, d]."""
    assert causal and q.dim() == 3 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    bounds = cu_seqlens_q.tolist()
    assert bounds == cu_seqlens_k.tolist() and bounds[0] == 0 and bounds[-1] == len(q)
    parts = [slice(a, b) for a, b in zip(bounds, bounds[1:], strict=False)]
    assert all(0 < part.stop - part.start <= min(max_seqlen_q, max_seqlen_k) for part in parts)
    return torch.cat([_attend(q[part], k[part], v[part], window_size[0]) for part in parts])


class LigerFusedLinearCrossEntropyFunction:
    @staticmethod
    def apply(
        _input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
        reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None, use_token_scaling=False,
        return_token_accuracy=False, return_predicted_tokens=False, ce_impl=None, ce_mode=None, chunk_mem_const=1,
    ):  # fmt: skip
        """(losses, z-loss, accuracy, predicted tokens)."""
        assert bias is None and ce_weight is None and softcap is None and not lse_square_scale and not label_smoothing
        logits = F.linear(_input, weight)
        return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction), None, None, None


def linear_cross_entropy(
    e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high", impl="cce"
):
    assert filter_eps is None and impl == "cce" and not shift and softcap is None and e.is_contiguous()
    return F.cross_entropy(F.linear(e, c), targets, ignore_index=ignore_index, reduction=reduction)


FUNCTIONS = {
    "mamba_ssm.ops.triton.ssd_combined": [mamba_chunk_scan_combined],
    "causal_conv1d": [causal_conv1d_fn],
    "flash_attn": [flash_attn_func, flash_attn_varlen_func],
    "liger_kernel.ops.fused_linear_cross_entropy": [LigerFusedLinearCrossEntropyFunction],
    "cut_cross_entropy": [linear_cross_entropy],
}


def install(monkeypatch) -> None:
    """From now on these are what the packages are, and this machine has a GPU that is new enough for them."""
    for name, functions in FUNCTIONS.items():
        module = ModuleType(name)
        for function in functions:
            setattr(module, function.__name__, function)
        for parent in [name.rsplit(".", i)[0] for i in range(1, name.count(".") + 1)]:
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        monkeypatch.setitem(sys.modules, name, module)
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda package: VERSIONS.get(package) or real(package))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
