"""The gate of selective attention: which tokens attend, how much they take, what it costs (arXiv 2410.18572)."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_taipan.layer_kinds.selective import GATE_METRICS
from megatron_taipan.model.build import Build, KeepsFp32Params
from megatron_taipan.model.context import Context
from megatron_taipan.model.noise import gumbel_noise, uniform_noise
from megatron_taipan.ops.numerics import wide_dtype
from megatron_taipan.ops.operations import takes_kernels
from megatron_taipan.ops.product import wide_product


class Selection(NamedTuple):
    """The gate's decision for tokens [b, l] (or this rank's shard of them, [n/tp]). A tuple for ZeRO-3's sake."""

    m: Tensor  # [b, l] 0 or 1; in training with the straight-through gradient of the selected class
    alpha: Tensor  # [b, l] weight of the attention output, the noiseless softmax of class 1
    selected: Tensor  # [b, l] bool, of all tokens on every rank
    margin: Tensor  # [b, l] s_1 - s_0, detached: what evaluation compares with the threshold
    budget_loss: Tensor | None = None  # scalar: (capacity - mean m)^2 of the batch, or its mean over rows
    metrics: Tensor | None = None  # [5] GATE_METRICS: means over the tokens, detached; neither in a step of decoding


def straight_through(logits: Tensor, noise: Tensor | None, tau: Tensor | float) -> tuple[Tensor, Tensor]:
    """The selected-class entry of a hard sample: (with the gradient of its softmax at temperature tau, without any).

    Args:
        logits, noise: [..., 2].
    """
    soft = ((logits if noise is None else logits + noise) / tau).softmax(-1)[..., 1]
    hard = (soft > 0.5).to(soft.dtype)
    return hard + soft - soft.detach(), hard


def reinmax(logits: Tensor, noise: Tensor | None, tau: Tensor | float) -> tuple[Tensor, Tensor]:
    """As `straight_through`, with the gradient of ReinMax (arXiv 2304.08612, algorithm 2), second order in m.

    For two classes of probabilities 1 - p and p it is (1 - p) / 2 times the loss's derivative where m = 1 was drawn and
    p / 2 times where m = 0 was, in expectation p (1 - p) times the mean of both: exact for a loss quadratic in m. The
    straight-through estimator takes the derivative at the value drawn for the difference, so that a token whose loss
    is flat around m = 1 gets no credit for what it would lose at m = 0.
    """
    assert noise is not None  # GateConfig refuses it without draws
    hard = ((logits + noise).diff(dim=-1)[..., 0] > 0).to(logits.dtype)
    margin = logits.diff(dim=-1)[..., 0] / tau
    p = margin.detach().sigmoid()
    slope = torch.where(hard > 0, 1 - p, p) / 2
    return hard + slope * (margin - margin.detach()), hard


class Gate(KeepsFp32Params):
    """One linear layer d_model -> 2 in float32, and what follows from its logits.

    In training m is the selected-class entry of a hard Gumbel-softmax sample with straight-through gradient. In
    evaluation m = 1 where s_1 - s_0 exceeds `threshold`, without noise. Other kinds of noise: see GateConfig.
    """

    weight: Tensor
    bias: Tensor
    threshold: Tensor

    def __init__(self, build: Build, prefix: str, layer: int):
        super().__init__()
        self.tp, self.place, self.layer, self.seed = build.tp, build.place, layer, build.seed
        self.scores = build.ops.gate_scores
        gated = build.config.gated_layers
        self.index, self.gates = gated.index(layer), len(gated)  # its place among the gates
        gate = build.config.gate
        self.noise, self.budget, self.input_gradient = gate.noise, gate.budget, gate.input_gradient
        self.estimator = reinmax if gate.estimator == "reinmax" else straight_through
        build.parameters(self, prefix)
        self.register_buffer("threshold", torch.tensor(build.config.gate.threshold, dtype=torch.float32))

    def forward(self, u: Tensor, ctx: Context) -> Selection:
        """u: [b, l, d] normed hidden states (or this rank's shard [n/tp, d])."""
        weight, bias = self.tp.stream_parameters(self.weight, self.bias)
        u = u.detach() if self.input_gradient == "none" else u
        draws = self.training and self.noise == "gumbel"
        logits, noise = self._scores(u, weight, bias, ctx, draws)  # [b, l, 2] or [n/tp, 2]
        alpha = logits.softmax(-1)[..., 1]
        margin = (logits[..., 1] - logits[..., 0]).detach()
        above = margin > self.threshold
        counted = None  # m as the budget counts it
        if self.noise == "random":
            drawn = uniform_noise(self.seed, ctx.step, ctx.samples, ctx.position, self.layer)[..., 0]
            picked = self.tp.shard_sequence(drawn < ctx.gate.capacity)
            m = picked.to(alpha.dtype)
        elif self.training:
            m, hard = self.estimator(logits, noise, ctx.gate.tau)
            picked = hard > 0.5
            if self.input_gradient == "task":
                of_constant, _ = self._scores(u.detach(), weight, bias, ctx, draws=False)
                counted, _ = self.estimator(of_constant, noise, ctx.gate.tau)
        else:
            picked, m = above, above.to(alpha.dtype)
        if ctx.single:
            return Selection(m, alpha, picked, margin)
        rows = self.tp.embed_shard(m if counted is None else counted).view(ctx.batch, ctx.length)
        share = self.tp.sum_over_shards(rows.sum(-1)) / (ctx.length * ctx.pieces)  # [b] fraction selected of each row
        if self.place is not None:
            share = self.place.sum_pieces(share)
        budget_loss = self._budget_loss(share, ctx)
        metrics = self._metrics(picked, above, alpha, budget_loss)
        selected = self.tp.gather_sequence(picked).view(ctx.batch, ctx.length)
        return Selection(m, alpha, selected, margin, budget_loss, metrics)

    def _scores(
        self, u: Tensor, weight: Tensor, bias: Tensor, ctx: Context, draws: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Logits of u's tokens, and the noise of their selection where it `draws`; float32 or wider, [.., 2] each."""
        if self.scores is not None and takes_kernels(u):
            offset = self.tp.rank * len(u) if self.tp.sequence_parallel else 0
            counters = {"seed": self.seed, "step": ctx.step, "samples": ctx.samples, "position": ctx.position}
            return self.scores(u, weight, bias, **(counters if draws else {}), layer=self.layer, offset=offset)
        weight, bias = (t.to(wide_dtype(u.dtype)) for t in (weight, bias))
        logits = wide_product(u, weight, bias)
        if not draws:
            return logits, None
        return logits, self.tp.shard_sequence(gumbel_noise(self.seed, ctx.step, ctx.samples, ctx.position, self.layer))

    def _budget_loss(self, share: Tensor, ctx: Context) -> Tensor:
        """(C - share)^2 of each row, or of the whole batch; share [b]. With budget=layers: this layer's part of it.

        The batch of a step is spread over ranks and micro-batches, and its share is known when all have run. So a
        trainer gives the share of the step before, and the gradient is 2 (share before - C) times the gradient of this
        part's share: averaged over the parts, that of the batch's, however it was split.
        """
        capacity, before = ctx.gate.capacity, ctx.gate.shares
        if self.budget == "row":
            return (capacity - share).square().mean()
        share, parts = share.mean(), self.gates if self.budget == "layers" else 1
        if before is None:  # of other layers nothing is known either
            return (capacity - share).square() / parts
        slope = 2 * ((before.mean() if self.budget == "layers" else before[self.index]) - capacity)
        return ((capacity - share.detach()).square() + slope * (share - share.detach())) / parts

    @torch.no_grad()
    def _metrics(self, picked: Tensor, above: Tensor, alpha: Tensor, budget_loss: Tensor) -> Tensor:
        a = alpha.float().clamp(1e-7, 1 - 1e-7)
        entropy = -(a * a.log() + (1 - a) * (1 - a).log())
        means = [t.float().mean() for t in (picked, above, alpha, entropy)]
        if self.tp.sequence_parallel:
            means = list((self.tp.all_reduce_sum(torch.stack(means)) / self.tp.size).unbind())
        found = dict(zip(("selected", "selected_eval", "alpha", "entropy"), means, strict=True), budget=budget_loss)
        return torch.stack([found[name].float() for name in GATE_METRICS])
