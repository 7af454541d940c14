"""Which tensors stay float32 when the model is cast, and that moving it does not harm them."""

import pytest
import torch

from megatron_taipan.model.taipan import Taipan
from tests.model.small import close, small_config, small_model, tokens, told

ISLANDS = ("A_log", "dt_bias", "mixer.D", "gate.weight", "gate.bias", "gate.threshold")
PATTERN = "M S W A"


def tensors(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


CASTS = {
    "bfloat16()": (lambda m: m.bfloat16(), torch.bfloat16),
    "half()": (lambda m: m.half(), torch.float16),
    "to(dtype)": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "to(device, dtype)": (lambda m: m.to("cpu", torch.bfloat16), torch.bfloat16),
    "twice": (lambda m: m.bfloat16().to("cpu").half().bfloat16(), torch.bfloat16),
}


@pytest.mark.parametrize("cast", CASTS)
def test_islands_keep_type_and_bits(cast):
    model = small_model(PATTERN, torch.float32)
    before = {name: t.detach().clone() for name, t in tensors(model).items()}
    run, dtype = CASTS[cast]
    after = tensors(run(model))
    fp32_params = [name for name in after if name.endswith(ISLANDS)]
    assert len(fp32_params) == len(ISLANDS)
    for name, tensor in after.items():
        if name in fp32_params:
            assert tensor.dtype == torch.float32 and torch.equal(tensor, before[name]), name
        else:
            assert tensor.dtype == dtype, name


def test_float64_and_devices_reach_the_islands_too():
    model = small_model(PATTERN, torch.float32).double()
    assert all(t.dtype == torch.float64 for t in tensors(model).values())
    moved = small_model(PATTERN, torch.float32).to("meta")
    assert all(t.device.type == "meta" for t in tensors(moved).values())
    empty = small_model(PATTERN, torch.float32).to("meta").bfloat16()
    assert all(t.dtype == torch.float32 for name, t in tensors(empty).items() if name.endswith(ISLANDS))


def test_shapes_alone_are_made_on_meta():
    with torch.device("meta"):
        model = Taipan(small_config(PATTERN))
    assert all(p.is_meta for p in model.parameters())
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in small_model(PATTERN).named_parameters()
    }


@pytest.mark.parametrize("wide", [True, False])
def test_stream_logits_loss_and_state_types_in_bf16(wide):
    model = small_model(PATTERN, torch.bfloat16, residual_fp32=wide)
    stream = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, args, out: stream.append((args[0].total().dtype, out[0].total().dtype)))
    out = model(tokens(2, 12), labels=tokens(2, 12, 1))
    assert {d for pair in stream for d in pair} == {torch.float32 if wide else torch.bfloat16}
    assert out.loss.dtype == out.ce_loss.dtype == out.budget_loss.dtype == torch.float32
    out.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.dtype == parameter.dtype and parameter.grad.isfinite().all(), name
    model.eval()
    cache = model.new_cache(2)
    with torch.no_grad():
        assert model(tokens(2, 12), cache=cache).logits.dtype == torch.float32
        model(tokens(2, 1), cache=cache)
    assert cache.layers[0].ssm.dtype == torch.float32
    assert cache.layers[0].conv_tail.dtype == cache.layers[1].keys.dtype == torch.bfloat16


def test_bf16_stays_near_float32():
    """The loss within 1 %; the decay rates are used as they are, not rounded."""
    exact, low = small_model("M W A"), small_model("M W A", torch.bfloat16)
    given = {"labels": tokens(4, 30, 1)}
    expected = exact(tokens(4, 30), **given).loss.item()
    assert low(tokens(4, 30), **given).loss.item() == pytest.approx(expected, rel=0.01)


def test_one_layers_gate_sees_the_same_logits_as_in_float32():
    """The gate computes in float32 from whatever the norm gives."""
    low = small_model("S", torch.bfloat16)
    gate, u = low.layers[0].gate, torch.randn(1, 9, 24).bfloat16()
    from megatron_taipan.model.context import make_context

    selection = gate(u, make_context(tokens(1, 9), None, None, 0, told()))
    s = u.double() @ gate.weight.double().T + gate.bias.double()
    assert selection.alpha.dtype == torch.float32
    close(selection.alpha.double(), s.softmax(-1)[..., 1], 1e-6)
