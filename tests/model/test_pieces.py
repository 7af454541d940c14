"""Layers over pieces of rows against their definitions on the joined rows, in float64: outputs and every gradient.

The rows of a batch lay documents out in every way that a border can meet them.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_taipan.model.context import make_context
from megatron_taipan.model.noise import gumbel_noise
from megatron_taipan.model.stream import Stream
from megatron_taipan.parallel.context import ContextParallel
from tests.distributed.launch import launch
from tests.model.oracles import attention, mamba2, rms_norm, rotary, swiglu, visible
from tests.model.small import close, documents, selecting, small_config, small_model, told

EPS, D = 1e-5, 24
# lengths of documents; pieces have 12 or 6 tokens
ROWS = [
    (24,),
    (12, 12), (11, 13), (13, 11),  # a document begins on a border of two pieces, one token before and after it
    (6, 6, 6, 6), (5, 6, 6, 7), (7, 6, 6, 5),  # the same at every border of four
    (1, 2, 3, 1, 17), (14, 3, 1, 2, 4),  # several in the first piece, and in the last
    (4, 17, 3), (8, 14, 2),  # one over four pieces and over three
    (10, 14), (9, 15),  # the convolution's three inputs before a border: two and three of them are its own
]  # fmt: skip
SHORT = [(12,), (5, 7), (3, 9), (1, 11), (2, 1, 9), (4, 1, 3, 4)]  # four pieces as short as the convolution's tail


@dataclass
class Job:
    """A layer, the first of its pattern, and the rows that it reads."""

    pattern: str
    changes: dict[str, Any] = field(default_factory=dict)
    rows: list[tuple[int, ...]] = field(default_factory=lambda: ROWS)
    training: bool = True
    shares: list[float] | None = None  # of each gate in the step before
    nothing_in: slice | None = None  # tokens of which the gate selects none

    @property
    def seq_idx(self) -> Tensor:
        return torch.cat([documents(*lengths) for lengths in self.rows])

    @property
    def samples(self) -> Tensor:
        return torch.arange(len(self.rows)) + 5

    def made(self, place: ContextParallel | None = None):
        """(model, h [b, l, d], upstream gradient)."""
        model = small_model(self.pattern, place=place, **self.changes).train(self.training)
        drawn = torch.Generator().manual_seed(4)
        h, upstream = torch.randn(2, *self.seq_idx.shape, D, generator=drawn, dtype=torch.float64)
        if self.nothing_in is not None:
            weight = model.layers[0].gate.weight.detach() / model.layers[0].norm.weight.detach()
            h[:, self.nothing_in] = 9 * (weight[0] - weight[1])
        return model, h, upstream

    def gate(self):
        shares = None if self.shares is None else torch.tensor(self.shares, dtype=torch.float64)
        return told(**self.changes.get("gate", {}))._replace(shares=shares)


M_JOBS = [Job("M", {"mamba": {"n_groups": groups}}, rows) for groups in (1, 2) for rows in (ROWS, SHORT)]
WINDOWS = [1, 4, 7, 15, 50]  # within a piece of 6, over its border, over several pieces, over the row
ATTENTION_JOBS = [
    *[Job("W", {"attention": {"window": window}}) for window in WINDOWS],
    *[Job("A", {"attention": {"rope_theta": 300.0, "n_kv_heads": heads}}) for heads in (1, 4)],
]
GATE_JOBS = [
    *[Job("S", {"attention": {"window": w}, "gate": {"gradient": "all", "tau": 0.7}}) for w in (4, 15)],
    *[Job("S", {"attention": {"window": w}}, training=False) for w in (4, 15)],
    Job("S", {"attention": {"window": 9}}, training=False, nothing_in=slice(6, 12)),
    Job("S", {"gate": {"gradient": "all", "budget": "batch"}}),
    Job("S", {"gate": {"gradient": "all", "budget": "batch"}}, shares=[0.1]),
    Job("S M S", {"gate": {"gradient": "all", "budget": "layers"}}, shares=[0.9, 0.6]),
]
JOBS = [*M_JOBS, *ATTENTION_JOBS, *GATE_JOBS]


@dataclass
class Found:
    """What a layer gave: of a piece, or of the joined rows."""

    out: Tensor
    h: Tensor  # gradient of the input
    parameters: dict[str, Tensor]  # gradients
    selected: Tensor | None = None
    budget: Tensor | None = None

    @staticmethod
    def of(loss: Tensor, out: Tensor, h: Tensor, layer, selected=None, budget=None) -> "Found":
        names, parameters = zip(*layer.named_parameters(), strict=True)
        grads = torch.autograd.grad(loss, [h, *parameters])
        budget = budget if budget is None else budget.detach()
        return Found(out.detach(), grads[0], dict(zip(names, grads[1:], strict=True)), selected, budget)


def run_pieces() -> list[Found]:
    """Every job on this process's piece."""
    place = ContextParallel(dist.get_world_size(), dist.get_rank(), None)
    return [run_piece(job, place) for job in JOBS]


def run_piece(job: Job, place: ContextParallel) -> Found:
    model, h, upstream = job.made(place)
    layer, seq_idx = model.layers[0], job.seq_idx
    length = h.shape[1] // place.size
    own = slice(place.rank * length, (place.rank + 1) * length)
    start = torch.stack([(row == row[own.start]).nonzero()[0, 0] for row in seq_idx])
    h = h[:, own].clone().requires_grad_()
    tokens = torch.zeros(len(h), length, dtype=torch.int64)
    ctx = make_context(tokens, seq_idx[:, own], job.samples, 3, job.gate(), place=place, document_start=start)
    if not model.config.letters.startswith("S"):
        out = layer(Stream(h), ctx)[0].total()
        return Found.of((out * upstream[:, own]).sum(), out, h, layer)
    stream, selection = selecting(layer, Stream(h), ctx)
    out = stream.total()
    # every rank adds what its piece contributes, of the budget loss the same share
    loss = (out * upstream[:, own]).sum() + selection.budget_loss / place.size
    return Found.of(loss, out, h, layer, selection.selected, selection.budget_loss)


def join(pieces: list[Found]) -> Found:
    def along(name: str) -> Tensor:
        return torch.cat([getattr(piece, name) for piece in pieces], 1)

    first = pieces[0]
    parameters = {name: sum(piece.parameters[name] for piece in pieces) for name in first.parameters}
    if first.selected is None:
        return Found(along("out"), along("h"), parameters)
    budgets = torch.stack([piece.budget for piece in pieces])  # [pieces]: each piece knows the whole row's
    return Found(along("out"), along("h"), parameters, along("selected"), budgets)


def expected(job: Job) -> Found:
    """The definitions, on the joined rows in this process."""
    model, h, upstream = job.made()
    layer, seq_idx, config = model.layers[0], job.seq_idx, model.config
    h.requires_grad_()
    if config.letters == "M":
        out = mamba2(layer, h, seq_idx, headdim=config.mamba.headdim, groups=config.mamba.n_groups)
        return Found.of((out * upstream).sum(), out, h, layer)
    full = config.letters == "A"
    turn = rotary(seq_idx, config.attention.rope_theta) if full else (lambda x: x)
    mask = visible(seq_idx, None if full else config.attention.window)
    u = rms_norm(h, layer.norm.weight, EPS)
    o = attention(u, layer.attention, mask, 4, config.n_kv_heads, turn)
    if not config.letters.startswith("S"):
        middle = h + o
        out = middle + swiglu(rms_norm(middle, layer.mlp_norm.weight, EPS), layer.mlp)
        return Found.of((out * upstream).sum(), out, h, layer)
    m, alpha = decided(job, layer, u)
    middle = h + (m * alpha)[..., None] * (o - h)
    out = middle + swiglu(rms_norm(middle, layer.mlp_norm.weight, EPS), layer.mlp)
    budget, slope = budget_of(job, m, len(config.gated_layers))
    loss = (out * upstream).sum() + slope
    return Found.of(loss, out, h, layer, m > 0.5, budget)


def decided(job: Job, layer, u: Tensor) -> tuple[Tensor, Tensor]:
    """m with its straight-through gradient, and alpha, [b, l], from the noise of the joined rows."""
    s = u @ layer.gate.weight.T + layer.gate.bias
    alpha = s.softmax(-1)[..., 1]
    if not job.training:
        return (s[..., 1] > s[..., 0]).to(s.dtype), alpha
    noise = gumbel_noise(1, 3, job.samples, torch.arange(s.shape[1]), 0)
    soft = ((s + noise) / job.gate().tau).softmax(-1)[..., 1]
    return (soft > 0.5).to(s.dtype) + soft - soft.detach(), alpha


def budget_of(job: Job, m: Tensor, gates: int) -> tuple[Tensor, Tensor]:
    """The budget loss, and a scalar with its gradient."""
    capacity, kind = job.gate().capacity, job.changes.get("gate", {}).get("budget", "row")
    if kind == "row":
        loss = ((capacity - m.mean(1)) ** 2).mean()
        return loss, loss
    share = m.mean()
    loss = (capacity - share) ** 2 / (gates if kind == "layers" else 1)
    if job.shares is None:
        return loss, loss
    before = sum(job.shares) / len(job.shares)
    return loss, 2 * (before - capacity) * share / (gates if kind == "layers" else 1)


@pytest.fixture(scope="module", params=[2, 4])
def found(request) -> tuple[int, list[Found]]:
    """Number of pieces, and every job's result."""
    return request.param, [join(list(pieces)) for pieces in zip(*launch(request.param, run_pieces), strict=True)]


@pytest.mark.parametrize("number", range(len(JOBS)), ids=lambda number: f"{number}-{JOBS[number].pattern[:1]}")
def test_pieces_give_what_the_joined_rows_give(found, number):
    ours, theirs = found[1][number], expected(JOBS[number])
    if theirs.selected is not None:
        assert torch.equal(ours.selected, theirs.selected)
        assert 0 < theirs.selected.sum() < theirs.selected.numel()
        close(ours.budget, theirs.budget.expand_as(ours.budget))
    for row, lengths in enumerate(JOBS[number].rows):
        torch.testing.assert_close(ours.out[row], theirs.out[row], rtol=0, atol=1e-10, msg=f"documents {lengths}")
        torch.testing.assert_close(ours.h[row], theirs.h[row], rtol=0, atol=1e-9, msg=f"gradient, {lengths}")
    for name, grad in theirs.parameters.items():
        torch.testing.assert_close(ours.parameters[name], grad, rtol=1e-9, atol=1e-9, msg=name)


def test_a_piece_without_selected_tokens_is_among_them():
    job = next(job for job in GATE_JOBS if job.nothing_in)
    selected = expected(job).selected
    assert not selected[:, job.nothing_in].any() and selected.any()


def test_the_rows_meet_a_border_in_every_way():
    config = small_config("M")
    begins = {sum(lengths[:i]) for lengths in ROWS for i in range(1, len(lengths))}
    for border in (6, 12, 18):
        assert {border - 1, border, border + 1} <= begins
    assert {12 - back for back in range(1, config.mamba.d_conv)} <= begins
