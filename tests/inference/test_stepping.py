"""A step of one token a row is the function that the forward pass with a cache is, in whatever order they are mixed."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_taipan.inference.stepping import Stepper
from megatron_taipan.model.fused_params import adjoin
from megatron_taipan.model.mamba2 import Mamba2
from tests.inference.networks import VOCABULARY, small_model
from tests.inference.test_decoding import PATTERNS


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_steps_and_chunks_in_any_order_equal_the_full_forward(data):
    model = small_model(data.draw(st.sampled_from(PATTERNS)))
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(20, 40))  # beyond twice the window of 6
    tokens = torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(length))
    seq_idx = torch.ones(rows, length, dtype=torch.int32)
    for row in range(rows):
        seq_idx[row, : data.draw(st.integers(0, 9))] = 0  # left padding, inside the first chunk
    cache, at, parts = model.new_cache(rows), 10, []
    with torch.no_grad():
        parts.append(model(tokens[:, :at], seq_idx=seq_idx[:, :at], cache=cache).logits)
        while at < length:
            if data.draw(st.integers(0, 3)):
                parts.append(model.step(tokens[:, at : at + 1], cache)[:, None])
                at += 1
            else:
                end = min(at + data.draw(st.integers(1, 8)), length)
                parts.append(model(tokens[:, at:end], seq_idx=seq_idx[:, at:end], cache=cache).logits)
                at = end
        whole = model(tokens, seq_idx=seq_idx).logits
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)
    assert cache.length == length


@pytest.mark.parametrize(
    "gate",
    [{"noise": "random", "capacity": 0.5}, {"refinement": "add", "weight": "one"}, {"refinement": "add"}],
    ids=str,
)
def test_gates_of_every_kind_decide_in_a_step_as_in_the_forward_pass(gate):
    model = small_model("M S S", gate=gate)
    tokens = torch.randint(0, VOCABULARY, (2, 30), generator=torch.Generator().manual_seed(3))
    cache = model.new_cache(2)
    with torch.no_grad():
        got = torch.stack([model.step(tokens[:, at : at + 1], cache) for at in range(30)], 1)
        torch.testing.assert_close(got, model(tokens).logits, rtol=0, atol=1e-9)


def test_a_document_may_begin_with_steps_and_rows_may_leave():
    model = small_model("M S W A")
    tokens = torch.randint(0, VOCABULARY, (3, 30), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(3)
    stepper = Stepper(model, cache)
    with torch.no_grad():
        for at in range(30):
            if at == 15:
                cache.select(torch.tensor([2, 0]))
                tokens = tokens[[2, 0]]
            logits = stepper.step(tokens[:, at : at + 1])
        torch.testing.assert_close(logits, model(tokens).logits[:, -1], rtol=0, atol=1e-9)


def test_steps_write_where_they_read():
    """What a captured step needs: the tensors stay the same ones."""
    model = small_model("M S W")
    cache = model.new_cache(2)
    with torch.no_grad():
        model(torch.zeros(2, 5, dtype=torch.int64), cache=cache)
        model.step(torch.zeros(2, 1, dtype=torch.int64), cache)
        before = cache.tensors()
        for _ in range(20):  # the buffer of 12 is moved on the way
            model.step(torch.ones(2, 1, dtype=torch.int64), cache)
    assert all(a is b for a, b in zip(before, cache.tensors(), strict=True))


def test_a_step_is_captured_again_where_the_weights_moved(monkeypatch):
    """A graph of a GPU reads the addresses that were captured, whatever is there now."""
    captures = []

    def capture(stepper, tokens):
        captures.append(stepper)
        stepper.tokens, stepper.logits = tokens.clone(), torch.empty(2, VOCABULARY, dtype=torch.float64)

        def replay():
            stepper.logits.copy_(stepper.model.step_on_device(stepper.tokens, stepper.cache))

        stepper.graph = SimpleNamespace(replay=replay)

    def stepper_of(model):
        stepper = Stepper(model, model.new_cache(2))
        stepper.captured = True
        stepper._arrange_weights()
        return stepper

    monkeypatch.setattr(Stepper, "_capture", capture)
    model, tokens = small_model("M S W A"), torch.zeros(2, 1, dtype=torch.int64)
    stepper = stepper_of(model)

    def captured_again() -> bool:
        captures.clear()
        for _ in range(4):  # two of which are not captured
            stepper.step(tokens)
        return stepper in captures

    with torch.no_grad():
        assert captured_again() and not captured_again()
        stepper_of(model)
        assert not captured_again()  # what trains was not moved
        model.requires_grad_(False)
        model.graphs = object()
        stepper_of(model)
        assert not captured_again()  # nor was what graphs of training read
        model.graphs = None
        stepper_of(model)
        assert captured_again() and not captured_again()
        stepper_of(model)
        model.load_state_dict(model.state_dict())
        assert not captured_again()  # copied into the same memory
        model.load_state_dict({name: t.clone() for name, t in model.state_dict().items()}, assign=True)
        assert captured_again()
        model.float().double()
        assert captured_again()
        assert adjoin(tuple(getattr(model.layers[0].mixer, name) for name in Mamba2.read_together[0]))
        length = stepper.cache.length
        whole = model(tokens.expand(2, length)).logits[:, -1]
        torch.testing.assert_close(stepper.logits, whole, rtol=0, atol=1e-4)  # some steps of other weights, rounded


def test_steps_may_run_under_autocast():
    model = small_model("M S W A", torch.float32)
    tokens, cache = torch.arange(12)[None], model.new_cache(1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(tokens[:, :4], cache=cache)
        got = torch.stack([model.step(tokens[:, at : at + 1], cache) for at in range(4, 12)], 1)
        whole = model.double()(tokens).logits[:, 4:]
    assert (got - whole).norm() / whole.norm() < 0.05


def test_training_has_no_steps():
    model = small_model("M").train()
    with pytest.raises(ValueError, match="evaluation mode"):
        model.step(torch.zeros(1, 1, dtype=torch.int64), model.new_cache(1))
