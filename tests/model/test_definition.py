"""Whole networks of every layer against the definition: float64, one document at a time, token by token, no chunks.

Weights are read by name; nothing of the model, its operations or its packing is used, only the gate's noise.
"""

import math
import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_taipan.model.noise import gumbel_noise
from megatron_taipan.model_config import ModelConfig
from tests.model.oracles import rms_norm
from tests.model.small import close, documents, small_model, tokens

Weights = dict[str, Tensor]


def mamba(u: Tensor, w: Weights, c: ModelConfig) -> Tensor:
    """The recurrence of a Mamba-2 block on one document [l, d]."""
    m, heads = c.mamba, c.mamba_heads

    def convolved(part: str) -> Tensor:
        x = F.pad((u @ w[f"in_proj_{part}"].T), (0, 0, m.d_conv - 1, 0))
        taps = [x[t : t + m.d_conv].mul(w[f"conv_{part}_weight"].T).sum(0) for t in range(len(u))]
        return F.silu(torch.stack(taps) + (w[f"conv_{part}_bias"] if m.conv_bias else 0))

    x, B, C = (convolved(part) for part in "xBC")
    x = x.view(-1, heads, m.headdim)
    B, C = (t.view(-1, m.n_groups, m.d_state).repeat_interleave(heads // m.n_groups, 1) for t in (B, C))
    dt = F.softplus(u @ w["in_proj_dt"].T + w["dt_bias"])  # [l, h]
    state, y = u.new_zeros(heads, m.headdim, m.d_state), []
    for t in range(len(u)):
        decay = (-dt[t] * w["A_log"].exp()).exp()
        state = decay[:, None, None] * state + torch.einsum("h,hp,hn->hpn", dt[t], x[t], B[t])
        y.append(torch.einsum("hpn,hn->hp", state, C[t]) + w["D"][:, None] * x[t])
    gated = torch.stack(y).flatten(1) * F.silu(u @ w["in_proj_z"].T)
    groups = zip(gated.chunk(m.n_groups, 1), w["norm_weight"].chunk(m.n_groups), strict=True)
    return torch.cat([rms_norm(part, weight, c.norm_eps) for part, weight in groups], 1) @ w["out_proj"].T


def attention(u: Tensor, w: Weights, c: ModelConfig, letter: str) -> Tensor:
    """Every query of one document [l, d], one at a time."""
    heads, kv, size = c.attention.n_heads, c.n_kv_heads, c.head_dim
    q, k, v = ((u @ w[f"{n}_proj"].T).view(len(u), -1, size) for n in "qkv")
    if letter == "A":
        frequency = c.attention.rope_theta ** (-torch.arange(0, size, 2, dtype=u.dtype) / size)
        turn = torch.polar(torch.ones(()).double(), torch.arange(len(u), dtype=u.dtype)[:, None, None] * frequency)

        def turned(t: Tensor) -> Tensor:
            z = torch.complex(*t.chunk(2, -1)) * turn
            return torch.cat([z.real, z.imag], -1)

        q, k = turned(q), turned(k)
    k, v = (t.repeat_interleave(heads // kv, 1) for t in (k, v))
    out = []
    for i in range(len(u)):
        seen = slice(0 if letter == "A" else max(0, i + 1 - c.attention.window), i + 1)
        share = torch.einsum("hd,jhd->hj", q[i], k[seen]).div(math.sqrt(size)).softmax(-1)
        out.append(torch.einsum("hj,jhd->hd", share, v[seen]).flatten())
    return torch.stack(out) @ w["out_proj"].T


def network(weights: Weights, c: ModelConfig, row: Tensor, lengths: list[int], noise: dict[int, Tensor] | None):
    """Logits [l, v] of one row of documents, and what each gate selected: [l] with its straight-through gradient."""

    def under(prefix: str) -> Weights:
        return {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}

    h, picked = weights["embedding.weight"][row], []
    for i, letter in enumerate(c.letters):
        w = under(f"layers.{i}.")
        u = rms_norm(h, w["norm.weight"], c.norm_eps)
        if letter == "M":
            h = h + torch.cat([mamba(part, under(f"layers.{i}.mixer."), c) for part in u.split(lengths)])
            continue
        o = torch.cat([attention(part, under(f"layers.{i}.attention."), c, letter) for part in u.split(lengths)])
        if letter == "S":
            s = u @ w["gate.weight"].T + w["gate.bias"]
            if noise is None:
                m = taken = (s[:, 1] - s[:, 0] > w["gate.threshold"]).double()
            else:
                soft = ((s + noise[i]) / c.gate.tau).softmax(-1)[:, 1]
                hard = ((s + noise[i]).argmax(-1) == 1).double()
                m = hard + soft - soft.detach()
                taken = m if c.gate.gradient == "all" else m * hard  # "selected": none through an unselected token's m
            picked.append(m)
            h = h + (taken * s.softmax(-1)[:, 1])[:, None] * (o - h)
        else:
            h = h + o
        u = rms_norm(h, w["mlp_norm.weight"], c.norm_eps)
        h = h + (F.silu(u @ w["mlp.gate_proj"].T) * (u @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T
    head = weights["embedding.weight" if c.tie_embeddings else "head.weight"]
    return rms_norm(h, weights["final_norm.weight"], c.norm_eps) @ head.T, picked


LENGTHS = [[5, 1, 9, 2], [2, 3, 1, 11]]  # two rows of documents, shorter and longer than convolution and window
CASES = {
    "groups": ("M S W A", {"mamba": {"n_groups": 3}, "gate": {"gradient": "all", "tau": 0.5, "budget_lambda": 0.3}}),
    "selected": ("(M S)*2", {"mamba": {"n_groups": 1, "conv_bias": False}, "gate": {"threshold": 0.3}}),
    "untied": ("A S M S", {"tie_embeddings": False, "attention": {"n_kv_heads": 1, "window": 2}, "norm_eps": 1e-2}),
    "wide": ("S M W", {"attention": {"n_kv_heads": 4, "head_dim": 10, "window": 50}, "mamba": {"d_conv": 6}}),
}


@pytest.mark.parametrize("case", CASES)
def test_network_equals_its_definition(case):
    """Losses and every gradient in training, logits in evaluation, whole and through the cache in uneven pieces."""
    pattern, changes = CASES[case]
    model = small_model(pattern, **changes)
    c, ids, labels = model.config, tokens(2, 17), tokens(2, 17, 1)
    seq_idx = torch.cat([documents(*lengths) for lengths in LENGTHS])
    mask = (torch.rand(2, 17, generator=torch.Generator().manual_seed(2)) < 0.6).double()
    samples = torch.tensor([40, 7])
    weights = {n: t.detach().clone().requires_grad_() for n, t in model.state_dict().items()}

    gates = [i for i, letter in enumerate(c.letters) if letter == "S"]
    drawn = {i: gumbel_noise(1, 3, samples, torch.arange(17), i).double() for i in gates}
    ce, budget = torch.zeros(()).double(), torch.zeros(()).double()
    for r in range(2):
        logits, picked = network(weights, c, ids[r], LENGTHS[r], {i: noise[r] for i, noise in drawn.items()})
        ce = ce + (F.cross_entropy(logits, labels[r], reduction="none") * mask[r]).sum() / mask.sum()
        budget = budget + sum((c.gate.capacity - m.mean()).square() for m in picked) / 2
    out = model(ids, labels=labels, loss_mask=mask, seq_idx=seq_idx, samples=samples, step=3)
    close(out.ce_loss, ce)
    close(out.budget_loss, budget)
    named = dict(model.named_parameters())
    theirs = torch.autograd.grad(ce + c.gate.budget_lambda * budget, [weights[name] for name in named])
    for name, a, b in zip(named, torch.autograd.grad(out.loss, list(named.values())), theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")

    model.eval()
    with torch.no_grad():
        expected = torch.stack([network(weights, c, ids[r], LENGTHS[r], None)[0] for r in range(2)])
        close(model(ids, seq_idx=seq_idx).logits, expected)
        cache, sizes = model.new_cache(2), random.Random(0).choices([1, 1, 2, 5], k=17)
        cuts = [min(sum(sizes[:k]), 17) for k in range(18)]
        pieces = [slice(a, b) for a, b in zip(cuts, cuts[1:], strict=False) if a < b]
        parts = [model(ids[:, p], seq_idx=seq_idx[:, p], cache=cache).logits for p in pieces]
        close(torch.cat(parts, 1), expected)
