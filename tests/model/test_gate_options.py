"""The options of the gate beyond the paper: kinds of noise, addition, weights, budgets, and what their gradients reach.

Oracles are written out with dense masks in float64, or finite probabilities.
"""

import pytest
import torch
from torch import Tensor

from megatron_taipan.gate_config import GateConfig
from megatron_taipan.model.context import Context, make_context
from megatron_taipan.model.gate_settings import GateSettings, computes_every_query, settled
from megatron_taipan.model.noise import gumbel_noise
from megatron_taipan.model.stream import Stream
from tests.model.oracles import attention, rms_norm, swiglu, visible
from tests.model.small import close, documents, selecting, small_model, tokens, told

B, L, D = 3, 17, 24


def context(step: int = 0, samples: Tensor | None = None, **settings) -> Context:
    gate = told()._replace(**settings)
    return make_context(tokens(B, L), None, torch.arange(B) if samples is None else samples, step, gate)


def hidden() -> Tensor:
    return torch.randn(B, L, D, dtype=torch.float64, requires_grad=True)


def one_gate(**options):
    return small_model("S", gate=options).layers[0].gate


def logits_of(gate, u: Tensor) -> Tensor:
    return u @ gate.weight.T + gate.bias


# --- noise ---


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_without_noise_the_larger_logit_wins_and_the_softmax_is_differentiated(tau):
    gate, u = one_gate(noise="none"), hidden()
    m = gate(u, context(tau=tau)).m
    s = logits_of(gate, u)
    close(m.detach(), (s[..., 1] > s[..., 0]).double(), 1e-15)
    assert 1 < m.sum() < m.numel() - 1
    upstream = torch.randn_like(m)
    ours = torch.autograd.grad(m, [u, gate.weight, gate.bias], upstream, retain_graph=True)
    soft = ((s[..., 1] - s[..., 0]) / tau).sigmoid()
    for a, b in zip(ours, torch.autograd.grad(soft, [u, gate.weight, gate.bias], upstream), strict=True):
        close(a, b, 1e-12)
    assert torch.equal(gate(u, context(step=1, tau=tau)).m, m)


def test_a_random_gate_draws_with_probability_c_whatever_the_logits_are():
    gate = one_gate(noise="random")
    u = torch.randn(B, L, D, dtype=torch.float64).mul(50).requires_grad_()  # logits that decide, if they are asked
    rows = torch.stack([gate(u, context(step, capacity=0.3)).selected for step in range(400)]).float()
    each = rows.mean(0)  # [b, l]
    assert abs(rows.mean() - 0.3) < 0.01 and each.min() > 0.15 and each.max() < 0.45
    assert not gate(u, context(capacity=0.3)).m.requires_grad
    first = gate(u, context(5, capacity=0.3)).selected
    gate.eval()
    assert torch.equal(gate(u, context(5, capacity=0.3)).selected, first)
    assert not torch.equal(gate(u, context(6, capacity=0.3)).selected, first)
    assert gate(u, context(5, capacity=0.0)).m.sum() == 0 and gate(u, context(5, capacity=1.0)).m.sum() == B * L


# --- refinement and weight ---


def dense(layer, h: Tensor, hard: Tensor, *, adds: bool, weighs: bool) -> tuple[Tensor, Tensor]:
    """The block with every query computed, and m as a tensor of its own graph; see test_gate.py."""
    u = rms_norm(h, layer.norm.weight, 1e-5)
    s = logits_of(layer.gate, u)
    soft = (s + gumbel_noise(1, 0, torch.arange(B), torch.arange(L), 0).double()).softmax(-1)[..., 1]
    m = hard.double() + soft - soft.detach()
    weight = (m * s.softmax(-1)[..., 1] if weighs else m)[..., None]
    o = attention(u, layer.attention, visible(documents(L).expand(B, -1), 6), 4, 2)
    mixed = h + weight * o if adds else (1 - weight) * h + weight * o
    return mixed + swiglu(rms_norm(mixed, layer.mlp_norm.weight, 1e-5), layer.mlp), m


@pytest.mark.parametrize("weight", ["alpha", "one"])
@pytest.mark.parametrize("refinement", ["replace", "add"])
@pytest.mark.parametrize("gradient", ["selected", "all"])
def test_the_block_equals_its_definition_with_gradients(refinement, weight, gradient):
    options = {"refinement": refinement, "weight": weight, "gradient": gradient}
    layer, h = small_model("S", gate=options).layers[0], hidden()
    stream, selection = selecting(layer, Stream(h), context())
    out = stream.total()
    expected, m = dense(layer, h, selection.selected, adds=refinement == "add", weighs=weight == "alpha")
    close(out, expected)
    upstream = torch.randn_like(out)
    if gradient == "all":
        leaves, names = [h, *layer.parameters()], ["h", *(n for n, _ in layer.named_parameters())]
    else:  # the gate's own gradient lacks what unselected tokens would send
        leaves = [p for n, p in layer.named_parameters() if "attention" in n or "mlp" in n]
        names = [n for n, _ in layer.named_parameters() if "attention" in n or "mlp" in n]
    ours = torch.autograd.grad(out, leaves, upstream, allow_unused=True)
    theirs = torch.autograd.grad(expected, leaves, upstream, allow_unused=True)
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            close(a, b)


@pytest.mark.parametrize("options", [{"refinement": "add"}, {"weight": "one"}, {"refinement": "add", "weight": "one"}])
def test_decoding_step_by_step_equals_one_pass(options):
    model = small_model("M S W S", gate=options).eval()
    given = tokens(2, 20)
    with torch.no_grad():
        whole = model(given).logits
        cache = model.new_cache(2)
        first = model(given[:, :9], cache=cache).logits
        steps = [model.step(given[:, i : i + 1], cache) for i in range(9, 20)]
    close(torch.cat([first, torch.stack(steps, 1)], 1), whole)


def test_the_bias_at_the_start_selects_as_told():
    gate = one_gate(init_bias=2.0)
    plain = one_gate()
    close(gate.bias - plain.bias, torch.tensor([0.0, 2.0], dtype=torch.float64))
    u = torch.zeros(B, L, D, dtype=torch.float64)
    with torch.no_grad():
        gate.bias.copy_(gate.bias - plain.bias)
    picked = torch.stack([gate(u, context(step)).m for step in range(200)]).mean()
    assert abs(picked - torch.tensor(2.0).sigmoid()) < 0.01  # 0.881


# --- which steps compute every query ---


@pytest.mark.parametrize("share", [0.1, 0.25, 0.3, 1.0])
def test_sampled_steps_are_spread_evenly_and_the_same_on_the_device(share):
    gate = GateConfig(gradient="sampled", gradient_share=share)
    chosen = [computes_every_query(gate, step) for step in range(1000)]
    assert sum(chosen) == pytest.approx(1000 * share, abs=1)
    gaps = torch.tensor([i for i, c in enumerate(chosen) if c]).diff()
    assert gaps.max() - gaps.min() <= 1
    assert [bool(computes_every_query(gate, torch.tensor(step))) for step in range(1000)] == chosen
    assert not any(computes_every_query(GateConfig(), step) for step in range(20))
    assert all(computes_every_query(GateConfig(gradient="all"), step) for step in range(20))


def test_sampled_steps_have_the_gradients_of_all_and_the_others_of_selected():
    given = {"labels": tokens(2, 30, 1), "samples": torch.tensor([4, 9])}

    def gradients(mode: str, step: int) -> list[Tensor]:
        model = small_model("M S W S", gate={"gradient": mode, "gradient_share": 0.5})
        out = model(tokens(2, 30), step=step, **given)
        return [out.loss.detach(), *torch.autograd.grad(out.loss, list(model.parameters()))]

    for step, mode in ((3, "all"), (4, "selected")):
        for a, b in zip(gradients("sampled", step), gradients(mode, step), strict=True):
            assert torch.equal(a, b)
    assert not all(torch.equal(a, b) for a, b in zip(gradients("all", 3), gradients("selected", 3), strict=True))


# --- budget ---


def test_the_budget_of_a_batch_is_one_square_and_that_of_rows_their_mean():
    gate, u = one_gate(), hidden()
    m = gate(u, context()).m
    close(gate(u, context()).budget_loss, (0.4 - m.mean(1)).square().mean())
    gate.budget = "batch"
    close(gate(u, context()).budget_loss, (0.4 - m.mean()).square())


def test_with_the_share_of_the_step_before_parts_of_a_batch_have_the_gradient_of_the_whole():
    gate = small_model("M S S", gate={"budget": "batch"}).layers[2].gate
    u = hidden()
    shares = torch.tensor([0.9, 0.65], dtype=torch.float64)  # of this gate, the second one: 0.65
    whole = gate(u, context(shares=shares))
    grad = torch.autograd.grad(whole.budget_loss, u)[0]
    expected = torch.autograd.grad(2 * (0.65 - 0.4) * gate(u, context()).m.mean(), u)[0]
    close(grad, expected, 1e-12)
    close(whole.budget_loss, (0.4 - whole.m.mean()).square())
    parts = []
    for row in range(B):
        ctx = make_context(tokens(1, L), None, torch.tensor([row]), 0, told()._replace(shares=shares))
        parts.append(torch.autograd.grad(gate(u[row : row + 1], ctx).budget_loss, u)[0])
    close(sum(parts) / B, grad, 1e-12)


@pytest.mark.parametrize(("reach", "of_task", "of_budget"), [("all", 1, 1), ("task", 1, 0), ("none", 0, 0)])
def test_what_reaches_the_layers_before_through_the_gates_input(reach, of_task, of_budget):
    gate, plain, u = one_gate(input_gradient=reach), one_gate(), hidden()
    ours, theirs = gate(u, context()), plain(u, context())
    assert torch.equal(ours.m, theirs.m) and torch.equal(ours.alpha, theirs.alpha)
    upstream = torch.randn(B, L, dtype=torch.float64)
    for find, reaches in ((lambda s: (s.m * s.alpha * upstream).sum(), of_task), (lambda s: s.budget_loss, of_budget)):
        a = torch.autograd.grad(find(ours), [u, gate.weight, gate.bias], retain_graph=True, allow_unused=True)
        b = torch.autograd.grad(find(theirs), [u, plain.weight, plain.bias], retain_graph=True)
        close(torch.zeros_like(u) if a[0] is None else a[0], b[0] * reaches, 1e-12)
        assert b[0].abs().max() > 1e-4
        for mine, its in zip(a[1:], b[1:], strict=True):  # the gate itself learns the same
            close(mine, its, 1e-12)


def mean_gradient(gate, u: Tensor, loss, draws: int = 8000) -> list[Tensor]:
    """Of loss(m [draws, L]) with respect to u [1, L, D] and the gate's parameters, over so many draws of the noise."""
    ctx = make_context(tokens(draws, L), None, torch.arange(draws), 0, told())
    selection = gate(u.expand(draws, L, D), ctx)
    close(selection.m.detach(), selection.selected.double(), 1e-12)
    return list(torch.autograd.grad(loss(selection.m).sum() / draws, [u, gate.weight, gate.bias]))


@pytest.mark.parametrize("reach", ["all", "task"])
def test_reinmax_has_the_gradient_of_the_expectation_of_a_quadratic_loss(reach):
    """E f(m) = (1 - p) f(0) + p f(1), for f(m) = a m^2 + b m; the straight-through estimator has another."""
    options = {"noise": "gumbel", "input_gradient": reach}
    gate, plain, u = one_gate(**options, estimator="reinmax"), one_gate(**options), hidden()[:1].detach()
    u.requires_grad_()
    a, b = torch.randn(2, L, dtype=torch.float64)
    p = logits_of(gate, u).softmax(-1)[..., 1]
    exact = torch.autograd.grad((p * (a + b)).sum(), [u, gate.weight, gate.bias])
    for ours, theirs in zip(mean_gradient(gate, u, lambda m: a * m**2 + b * m), exact, strict=True):
        assert (ours - theirs).norm() < 0.05 * theirs.norm()
    straight = mean_gradient(plain, u, lambda m: a * m**2 + b * m)
    assert (straight[0] - exact[0]).norm() > 0.2 * exact[0].norm()


def test_reinmax_without_draws_is_refused():
    with pytest.raises(ValueError, match="noise=none use straight-through"):
        GateConfig(noise="none", estimator="reinmax")


# --- what gates are told ---


def test_a_packed_vector_tells_the_same_as_its_parts():
    settings = settled(GateConfig(capacity=0.3, tau=0.5, budget_lambda=2.0, gradient="all"))
    vector = settings.pack(3, torch.device("cpu"))
    close(vector, torch.tensor([0.3, 0.5, 2.0, 1.0, 0.3, 0.3, 0.3]), 1e-7)
    again = GateSettings.unpack(vector)
    assert again.pack(3, torch.device("cpu")) is vector
    assert bool(again.every_query) and again.shares.shape == (3,)


def test_a_told_network_follows_what_it_is_told_and_an_untold_one_the_end_of_its_schedules():
    schedule = {"start": 0.9, "end": 0.2, "after": 0.1, "until": 0.5}
    options = {"capacity": schedule, "budget_lambda": {**schedule, "end": 3.0}, "tau": {**schedule, "end": 0.5}}
    scheduled, constant = (
        small_model("S", gate=options),
        small_model("S", gate={"capacity": 0.2, "budget_lambda": 3.0, "tau": 0.5}),
    )
    given = {"labels": tokens(2, 30, 1)}
    a, b = (model(tokens(2, 30), **given).loss for model in (scheduled, constant))
    assert torch.equal(a, b)
    vector = torch.tensor([0.6, 0.7, 5.0, 0.0, 0.0])
    other = small_model("S", gate={"capacity": 0.6, "budget_lambda": 5.0, "tau": 0.7})
    gradients = []
    for model, more in ((scheduled, {"gate": vector}), (other, {})):
        loss = model(tokens(2, 30), **given, **more).loss
        gradients.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for x, y in zip(*gradients, strict=True):
        close(x, y, 1e-6)
    assert not torch.allclose(gradients[0][0], a)


def test_layers_share_a_budget():
    model = small_model("M S S", gate={"budget": "layers", "capacity": 0.4})
    gates, u = [layer.gate for layer in model.layers[1:]], hidden()
    shares = torch.tensor([0.9, 0.3], dtype=torch.float64)
    losses = [gate(u, context(shares=shares)).budget_loss for gate in gates]
    for gate, loss in zip(gates, losses, strict=True):  # the derivative of (0.4 - mean of both)^2 at 0.6
        found = torch.autograd.grad(loss, u, retain_graph=True)[0]
        close(found, torch.autograd.grad(2 * (0.6 - 0.4) * gate(u, context()).m.mean() / 2, u)[0], 1e-12)
