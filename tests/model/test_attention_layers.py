"""The layers S, W and A against their definitions, written out with dense masks and torch's SDPA in float64."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_taipan.model.context import make_context
from megatron_taipan.model.stream import Stream
from tests.model.oracles import attention, rms_norm, rotary, swiglu, visible
from tests.model.small import close, documents, selecting, small_model, tokens, told

EPS = 1e-5
SEQ = torch.cat([documents(4, 9, 2, 6), documents(10, 1, 10)])  # two rows of 21 tokens


def stream(model) -> Tensor:
    return torch.randn(*SEQ.shape, 24, dtype=torch.float64).requires_grad_()


def context(seq_idx: Tensor | None = SEQ, step: int = 0):
    return make_context(tokens(2, 21), seq_idx, torch.tensor([5, 9]), step, told())


def assert_same_with_gradients(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    close(ours, theirs)
    upstream = torch.randn_like(ours)
    for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("letter", "window"), [("W", 1), ("W", 6), ("W", 50), ("A", 6)])
def test_window_and_full_attention(letter, window, kv_heads):
    model = small_model(letter, attention={"window": window, "n_kv_heads": kv_heads, "rope_theta": 300.0})
    layer, h = model.layers[0], stream(model)
    mask = visible(SEQ, None if letter == "A" else window)
    turn = rotary(SEQ, 300.0) if letter == "A" else (lambda x: x)
    middle = h + attention(rms_norm(h, layer.norm.weight, EPS), layer.attention, mask, 4, kv_heads, turn)
    expected = middle + swiglu(rms_norm(middle, layer.mlp_norm.weight, EPS), layer.mlp)
    ours = layer(Stream(h), context())[0].total()
    assert_same_with_gradients(ours, expected, [h, *layer.parameters()])


def selective(layer, h: Tensor, m: Tensor, kv_heads: int, window: int, refined: Tensor | None = None) -> Tensor:
    """taipan.md's table, dense: o for every token from all keys, then (1 - a) h + a o where m, h elsewhere."""
    u = rms_norm(h, layer.norm.weight, EPS)
    s = u @ layer.gate.weight.T + layer.gate.bias
    alpha = (s[..., 1] - s[..., 0]).sigmoid()[..., None]
    o = attention(u, layer.attention, visible(SEQ, window), 4, kv_heads)
    m = m[..., None].to(h.dtype)
    h = m * ((1 - alpha) * h + alpha * o) + (1 - m) * h
    return h + swiglu(rms_norm(h, layer.mlp_norm.weight, EPS), layer.mlp)


@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("window", [1, 6, 50])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 1e9, -1e9])
def test_selective_attention_in_evaluation(kv_heads, window, threshold):
    """No noise, m = 1 where s1 - s0 exceeds the threshold; also with nothing and with everything selected."""
    model = small_model("S", attention={"window": window, "n_kv_heads": kv_heads}, gate={"threshold": threshold}).eval()
    layer, h = model.layers[0], stream(model)
    s = rms_norm(h, layer.norm.weight, EPS) @ layer.gate.weight.T + layer.gate.bias
    m = s[..., 1] - s[..., 0] > threshold
    assert m.any() == (threshold < 1e9) and m.all() == (threshold == -1e9)
    out, selection = selecting(layer, Stream(h), context())
    ours = out.total()
    assert torch.equal(selection.selected, m)
    assert_same_with_gradients(ours, selective(layer, h, m, kv_heads, window), [h, *layer.parameters()])
    again, _ = layer(Stream(h), context(step=1))
    assert torch.equal(ours, again.total())


def test_selective_attention_takes_no_positions():
    """The same tokens further on in a longer document, beyond the window, give the same output."""
    model = small_model("S").eval()
    layer = model.layers[0]
    h = torch.randn(1, 8, 24, dtype=torch.float64)
    twice = layer(Stream(torch.cat([h, h, h], 1)), make_context(tokens(1, 24), None, None, 0, told()))[0].total()
    close(twice[:, 14:16], twice[:, 22:24])


def test_attention_is_computed_for_selected_queries_only():
    model = small_model("S").eval()
    layer, h, seen = model.layers[0], stream(model), []

    def watch(q, *args):
        seen.append(q.shape[0])
        return attend(q, *args)

    attend = layer.attention.ops.interval_attention
    layer.attention.ops = replace(layer.attention.ops, interval_attention=watch)
    for train in (False, True):
        layer.train(train)
        _, selection = selecting(layer, Stream(h), context())
        assert seen.pop() == selection.selected.sum() and not seen
        assert 0 < selection.selected.sum() < 42


def test_budget_is_taken_row_by_row_and_summed_over_layers():
    model = small_model("S M S", gate={"capacity": 0.3, "budget_lambda": 0.7})
    kept = []
    for layer in (model.layers[0], model.layers[2]):
        layer.gate.register_forward_hook(lambda _, __, out: kept.append(out))
    out = model(tokens(2, 21), labels=tokens(2, 21, 1), samples=torch.tensor([3, 8]))
    shares = [s.selected.double().mean(1) for s in kept]
    assert any(share[0] != share[1] for share in shares)  # else a mean over the batch would pass too
    expected = sum(((0.3 - share) ** 2).mean() for share in shares)
    close(out.budget_loss, expected)
    close(out.loss, out.ce_loss + 0.7 * expected)
    measured = model.named_metrics(out)
    logged = [measured[f"layers.{i}.selected"].item() for i in (0, 2)]
    assert logged == pytest.approx([share.mean().item() for share in shares])


def test_statistics_are_those_of_the_gates():
    model = small_model("S", gate={"threshold": 0.4})
    kept = []
    model.layers[0].gate.register_forward_hook(lambda _, __, out: kept.append(out))
    measured = model.named_metrics(model(tokens(2, 21), labels=tokens(2, 21, 1)))
    (selection,) = kept
    alpha = selection.alpha.detach()
    expected = {
        "selected": selection.m.mean(),
        "selected_eval": (alpha.logit() > 0.4).double().mean(),
        "alpha": alpha.mean(),
        "entropy": torch.distributions.Bernoulli(alpha).entropy().mean(),
        "budget": ((0.4 - selection.m.mean(1)) ** 2).mean(),
    }
    assert measured.keys() == {f"layers.0.{name}" for name in expected}
    for name, value in ((name, measured[f"layers.0.{name}"]) for name in expected):
        assert value.dtype == torch.float32 and value.dim() == 0 and not value.requires_grad
        assert value.item() == pytest.approx(expected[name].item(), abs=1e-6), name
    assert measured["layers.0.selected"] != measured["layers.0.selected_eval"]


@pytest.mark.parametrize("pattern", ["M", "S W A M"])
def test_loss_is_torchs_cross_entropy_of_the_logits(pattern):
    """With the mask's weights, over the mask's sum or times the trainer's factor."""
    model = small_model(pattern).eval()
    given, labels, mask = tokens(2, 9), tokens(2, 9, 1), torch.rand(2, 9).round(decimals=1)
    mask[0, :3] = 0
    per_token = F.cross_entropy(model(given).logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 9)
    close(model(given, labels=labels, loss_mask=mask).ce_loss, (per_token * mask).sum() / mask.sum(), 1e-6)
    close(model(given, labels=labels, loss_mask=mask, ce_scale=0.25).ce_loss, (per_token * mask).sum() * 0.25, 1e-6)
    close(model(given, labels=labels).ce_loss, per_token.mean(), 1e-6)
    close(model(given, all_logits=False).logits, model(given).logits[:, -1:])
