"""The gate: straight-through selection, its gradients, and the two gradient modes."""

import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_taipan.layer_kinds.selective import GATE_METRICS
from megatron_taipan.model import gate as gate_module
from megatron_taipan.model.context import make_context
from megatron_taipan.model.noise import gumbel_noise
from megatron_taipan.model.stream import Stream
from tests.model.oracles import attention, rms_norm, swiglu, visible
from tests.model.small import close, documents, selecting, small_model, tokens, told


def gate_of(n: int, logits: Tensor, **options):
    """A gate whose logits for the token i of `torch.eye(n)` are logits[i]: its weight is the table of logits."""
    model = small_model("S", d_model=n, gate=options)
    gate = model.layers[0].gate
    with torch.no_grad():
        gate.weight.copy_(logits.T)
        gate.bias.zero_()
    return gate


def draws(gate, n: int, rows: int, step: int = 0, **options):
    """`rows` independent selections of n tokens, and the tokens, a leaf [rows, n, n]."""
    u = torch.eye(n, dtype=torch.float64).expand(rows, n, n).clone().requires_grad_()
    return u, gate(u, make_context(torch.zeros(rows, n, dtype=torch.int64), None, None, step, told(**options)))


def by_logit(gate, grad_u: Tensor) -> Tensor:
    """Gradient of s_1 (that of s_0 is its negative) [rows, n] from the gradient of the tokens [rows, n, n]."""
    direction = (gate.weight[1] - gate.weight[0]).detach()
    return grad_u @ direction / direction.square().sum()


@pytest.mark.parametrize("tau", [0.5, 1.0, 3.0])
def test_equals_torchs_hard_gumbel_softmax_in_value_and_gradient(monkeypatch, tau):
    model = small_model("S", gate={"tau": tau})
    gate = model.layers[0].gate
    u = torch.randn(3, 15, 24, dtype=torch.float64, requires_grad=True)
    samples = torch.tensor([4, 0, 7])
    m = gate(u, make_context(tokens(3, 15), None, samples, 6, told(tau=tau))).m
    noise = gumbel_noise(1, 6, samples, torch.arange(15), 0).double()
    # torch draws its Gumbel noise as -log of an exponential variable.
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self: self.copy_((-noise).exp()))
    expected = F.gumbel_softmax(u @ gate.weight.T + gate.bias, tau, hard=True)[..., 1]
    assert 0 < expected.sum() < 45
    close(m, expected, 1e-15)
    upstream = torch.randn_like(m)
    leaves = (u, gate.weight, gate.bias)
    for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (m, expected)), strict=True):
        close(a, b, 1e-12)


def test_a_larger_logit_raises_m_of_unselected_tokens_too():
    """The paper's printed backward formula, the probability of the sampled class, has the other sign there."""
    gate = gate_of(4, torch.tensor([[0.0, -1.0], [0.3, 0.1], [0.0, 0.5], [-0.2, 1.0]], dtype=torch.float64))
    u, selection = draws(gate, 4, 50)
    slope = by_logit(gate, torch.autograd.grad(selection.m.sum(), u)[0])
    assert selection.selected.any() and not selection.selected.all()
    assert (slope > 0).all()


@pytest.mark.parametrize("capacity", [0.0, 1.0])
def test_gradient_has_the_sign_of_the_expected_losss_finite_differences(capacity):
    """Expectation over all 2^4 selections, each with its Bernoulli probability; a loss with a budget and a task."""
    logits = torch.tensor([[0.0, -0.8], [0.3, 0.1], [0.0, 0.4], [-0.2, 0.9]], dtype=torch.float64)
    pull = -0.3 if capacity else 0.3
    task = torch.tensor([1.0, 0.5, 0.2, 0.7], dtype=torch.float64) * pull

    def loss(m: Tensor) -> Tensor:
        return (capacity - m.mean(-1)).square() + (m * task).sum(-1) + 0.05 * pull * m[..., 0] * m[..., 2]

    def expected(margin: Tensor) -> Tensor:
        p, total = margin.sigmoid(), 0.0
        for bits in itertools.product((0.0, 1.0), repeat=4):
            m = torch.tensor(bits, dtype=torch.float64)
            total += torch.where(m > 0, p, 1 - p).prod() * loss(m)
        return total

    margin, eps = logits[:, 1] - logits[:, 0], 1e-4 * torch.eye(4, dtype=torch.float64)
    slope = torch.stack([(expected(margin + e) - expected(margin - e)) / 2e-4 for e in eps])
    gate = gate_of(4, logits)
    u, selection = draws(gate, 4, 4000)
    found = by_logit(gate, torch.autograd.grad(loss(selection.m).sum(), u)[0])
    for i in range(4):
        for chosen in (True, False):
            mean = found[selection.selected[:, i] == chosen, i].mean()
            assert mean.sign() == slope[i].sign(), (i, chosen)
    # A sampled two-class relaxation at tau = 1 is biased, but not by much.
    ratio = found.mean(0) / slope
    assert ((ratio > 0.4) & (ratio < 1.6)).all(), ratio


@pytest.mark.parametrize("tau", [0.3, 1.0, 2.5])
def test_a_token_is_selected_as_often_as_alpha_says(tau):
    alpha = torch.tensor([0.02, 0.15, 0.5, 0.9], dtype=torch.float64)
    logits = torch.stack([(1 - alpha).log(), alpha.log()], 1)
    rows = 20_000
    _, selection = draws(gate_of(4, logits), 4, rows, tau=tau)
    close(selection.alpha[0], alpha, 1e-12)
    error = (selection.m.mean(0) - alpha).abs() / (alpha * (1 - alpha) / rows).sqrt()
    assert (error < 4).all(), error


def test_evaluation_has_no_noise_and_honours_the_threshold():
    logits = torch.tensor([[0.0, -1.0], [0.0, 0.4], [0.0, 0.6], [1.0, 3.0]], dtype=torch.float64)
    gate = gate_of(4, logits).eval()
    expected = {-2.0: [1, 1, 1, 1], 0.0: [0, 1, 1, 1], 0.5: [0, 0, 1, 1], 1.9: [0, 0, 0, 1], 2.1: [0, 0, 0, 0]}
    for threshold, m in expected.items():
        gate.threshold.fill_(threshold)
        for step in range(3):
            _, selection = draws(gate, 4, 2, step)
            assert selection.m.tolist() == [m, m]
    assert gate_of(4, logits, threshold=0.5).threshold == 0.5


def test_what_a_gate_reports():
    """Shares of tokens, and the mean entropy of a token's two choices in nats, as torch's distributions have it."""
    logits = torch.tensor([[0.0, -1.0], [0.0, 0.4], [0.0, 0.6], [1.0, 4.0]], dtype=torch.float64)
    gate = gate_of(4, logits).eval()
    _, selection = draws(gate, 4, 2, capacity=0.25)
    found = dict(zip(GATE_METRICS, selection.metrics.tolist(), strict=True))
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    expected = {"selected": 0.75, "selected_eval": 0.75, "alpha": logits.softmax(-1)[:, 1].mean(), "entropy": entropy}
    assert found == pytest.approx({name: float(value) for name, value in expected.items()} | {"budget": 0.25})


def test_training_draws_anew_by_step_sample_and_layer():
    model = small_model("S S", d_model=4)
    h = torch.eye(4, dtype=torch.float64).expand(64, 4, 4)
    first, second = (layer.gate for layer in model.layers)
    second.load_state_dict(first.state_dict())

    def picks(gate, step: int, offset: int = 0) -> Tensor:
        ctx = make_context(torch.zeros(64, 4, dtype=torch.int64), None, torch.arange(64) + offset, step, told())
        return gate(h, ctx).selected

    assert torch.equal(picks(first, 3), picks(first, 3))
    for other in (picks(first, 4), picks(first, 3, 64), picks(second, 3)):
        assert not torch.equal(picks(first, 3), other)
    assert torch.equal(picks(first, 3)[5:], picks(first, 3, 5)[:-5])


def straight_through(layer, h: Tensor, seq_idx: Tensor, hard: Tensor) -> tuple[Tensor, Tensor]:
    """The block with every query computed, dense, and m [b, l] as a tensor of its own graph."""
    u = rms_norm(h, layer.norm.weight, 1e-5)
    s = u @ layer.gate.weight.T + layer.gate.bias
    noise = gumbel_noise(1, 0, torch.arange(h.shape[0]), torch.arange(h.shape[1]), 0).double()
    soft = (s + noise).softmax(-1)[..., 1]
    m = hard.double() + soft - soft.detach()
    alpha = s.softmax(-1)[..., 1]
    o = attention(u, layer.attention, visible(seq_idx, 6), 4, 2)
    mixed = h + (m * alpha)[..., None] * (o - h)
    return mixed + swiglu(rms_norm(mixed, layer.mlp_norm.weight, 1e-5), layer.mlp), m


def both_modes():
    """For each mode: the layer, its output, m, the gradient of m from a random loss, and every parameter's."""
    seq_idx = documents(4, 8, 5).expand(2, -1)
    h = torch.randn(2, 17, 24, dtype=torch.float64)
    upstream = torch.randn(2, 17, 24, dtype=torch.float64)
    results = {}
    for mode in ("selected", "all"):
        layer = small_model("S", gate={"gradient": mode}).layers[0]
        h_in = h.clone().requires_grad_()
        stream, selection = selecting(layer, Stream(h_in), make_context(tokens(2, 17), seq_idx, None, 0, told()))
        out = stream.total()
        grads = torch.autograd.grad(out, [selection.m, h_in, *layer.parameters()], upstream, allow_unused=True)
        results[mode] = layer, h_in, out, selection, grads
    return seq_idx, upstream, results


def test_modes_give_the_same_values_bit_for_bit():
    _, _, results = both_modes()
    (_, _, a, s, _), (_, _, b, t, _) = results.values()
    assert torch.equal(a, b) and torch.equal(s.selected, t.selected) and torch.equal(s.budget_loss, t.budget_loss)
    for pattern in ("S", "M S W S"):
        one, two = (small_model(pattern, torch.float32, gate={"gradient": g}) for g in ("selected", "all"))
        given = {"labels": tokens(2, 30, 1), "step": 5}
        assert torch.equal(one(tokens(2, 30), **given).loss, two(tokens(2, 30), **given).loss)


def test_mode_all_has_the_exact_gradient_of_every_m_and_parameter():
    seq_idx, upstream, results = both_modes()
    layer, h, out, selection, found = results["all"]
    expected_out, m = straight_through(layer, h, seq_idx, selection.selected)
    close(out, expected_out)
    expected = torch.autograd.grad(expected_out, [m, h, *layer.parameters()], upstream)
    assert (expected[0][~selection.selected].abs() > 1e-6).all()
    for a, b in zip(found, expected, strict=True):
        close(a, b)


@pytest.mark.parametrize(("mode", "expected"), [("selected", [True]), ("all", [True, False])])
def test_only_selected_queries_have_a_backward_pass(mode, expected):
    """Others have a weight of 0: a backward pass through them would cost more than their values, to add zeros."""
    model = small_model("S", gate={"gradient": mode})
    attend, learned = model.ops.interval_attention, []

    def noting(q: Tensor, *rest: Tensor) -> Tensor:
        o = attend(q, *rest)
        learned.append(o.requires_grad)
        return o

    model.layers[0].attention.ops = replace(model.ops, interval_attention=noting)
    model(tokens(2, 17), labels=tokens(2, 17, 1)).loss.backward()
    assert learned == expected


def test_mode_selected_has_that_gradient_for_selected_tokens_and_none_for_the_others():
    _, _, results = both_modes()
    chosen = results["all"][3].selected
    ours, exact = results["selected"][4], results["all"][4]
    assert 0 < chosen.sum() < chosen.numel()
    close(ours[0][chosen], exact[0][chosen])
    assert (ours[0][~chosen] == 0).all()
    # What does not pass through m is the same: attention and SwiGLU weights.
    names = ["m", "h", *(name for name, _ in results["all"][0].named_parameters())]
    for name, a, b in zip(names, ours, exact, strict=True):
        if "attention" in name or "mlp" in name:
            close(a, b)
    assert not torch.allclose(ours[names.index("gate.weight")], exact[names.index("gate.weight")])


def test_mode_selected_keeps_the_budget_gradient_of_unselected_tokens():
    gate = gate_of(4, torch.tensor([[0.0, -1.0], [0.3, 0.1], [0.0, 0.5], [-0.2, 1.0]], dtype=torch.float64))
    u, selection = draws(gate, 4, 30, capacity=1.0)
    slope = by_logit(gate, torch.autograd.grad(selection.budget_loss, u)[0])
    full = selection.selected.all(1, keepdim=True)  # rows whose budget is met have no gradient
    assert ((slope < 0) | full).all() and not full.all()


def test_the_noise_is_the_gates_seed_step_samples_position_and_layer(monkeypatch):
    seen = []
    monkeypatch.setattr(gate_module, "gumbel_noise", lambda *a: seen.append(a) or gumbel_noise(*a))
    model = small_model("M S S", seed=9)
    model(tokens(2, 7), labels=tokens(2, 7), samples=torch.tensor([30, 4]), step=11)
    assert [(a[0], a[1], a[2].tolist(), a[3].tolist(), a[4]) for a in seen] == [
        (9, 11, [30, 4], list(range(7)), 1),
        (9, 11, [30, 4], list(range(7)), 2),
    ]
