"""A model whose layers lie on two devices gives what it gives on one: texts, losses, gradients.

The second device is a GPU where there are two, and a pretended one elsewhere. Here nothing is hooked, so the model
moves everything itself; in test_device_map.py accelerate places the layers.
"""

from collections.abc import Iterator

import pytest
import torch

from megatron_taipan.hf import TaipanCache, TaipanForCausalLM
from megatron_taipan.model.context import make_context
from megatron_taipan.model.gate_settings import GateSettings
from tests.hf.second_device import DEVICE, SecondDevice
from tests.hf.test_modeling import hf_model, random_tokens
from tests.inference.test_decoding_gpu import SIZES


@pytest.fixture(params=["pretended", pytest.param("gpus", marks=pytest.mark.gpu)])
def devices(request) -> Iterator[tuple[torch.device, torch.device]]:
    if request.param == "gpus":
        if torch.cuda.device_count() < 2:
            pytest.skip("one CUDA device; these need two")
        yield torch.device("cuda:0"), torch.device("cuda:1")
        return
    with SecondDevice():
        yield torch.device("cpu"), DEVICE


def split(model: TaipanForCausalLM, devices: tuple[torch.device, torch.device]) -> TaipanForCausalLM:
    """Embedding and every other layer on the first device; the rest, and a head of its own, on the second."""
    first, second = devices
    network = model.model.to(first)
    for layer in [*network.layers[1::2], network.final_norm]:
        layer.to(second)
    model.lm_head.to(first if model.config.tie_word_embeddings else second)
    assert {p.device for p in model.parameters()} == {first, second}
    return model


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found.to(wanted.device), wanted, rtol=1e-9, atol=1e-10)


def packed() -> torch.Tensor:
    """Documents of 2 rows of 20 tokens."""
    seq_idx = torch.zeros(2, 20, dtype=torch.int32)
    seq_idx[0, 7:], seq_idx[1, 11:] = 1, 1
    return seq_idx


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_logits_and_hidden_states_are_those_of_one_device(devices, tied):
    first, second = devices
    whole, tokens = hf_model(tie_embeddings=tied).to(first), random_tokens(2, 20).to(first)
    model, seq_idx = split(hf_model(tie_embeddings=tied), devices), packed().to(first)
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0
    for facts in ({}, {"attention_mask": mask}, {"seq_idx": seq_idx}, {"logits_to_keep": tokens[0, :3] % 20}):
        logits = model(tokens, **facts).logits
        assert logits.device == (first if tied else second)
        same(logits, whole(tokens, **facts).logits)
    states = model(tokens, output_hidden_states=True).hidden_states
    for found, wanted in zip(states, whole(tokens, output_hidden_states=True).hidden_states, strict=True):
        same(found, wanted)
    embedded = whole.get_input_embeddings()(tokens)
    for place in devices:
        same(model(inputs_embeds=embedded.to(place)).logits, whole(tokens).logits)
    same(model(tokens.to(second), seq_idx=seq_idx.to(second)).logits, whole(tokens, seq_idx=seq_idx).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"prefill_chunk_size": 5}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_texts_are_those_of_one_device(devices, options):
    tokens = random_tokens(3, 12).to(devices[0])
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    whole, model = hf_model().to(devices[0]), split(hf_model(), devices)
    options = {"max_new_tokens": 6, "do_sample": False} | options
    for facts in ({}, {"attention_mask": mask}):
        assert torch.equal(model.generate(tokens, **facts, **options), whole.generate(tokens, **facts, **options))


@torch.no_grad()
def test_a_text_goes_on_from_a_returned_cache(devices):
    tokens, whole, model = random_tokens(2, 12).to(devices[0]), hf_model().to(devices[0]), split(hf_model(), devices)
    cache = TaipanCache()
    text = model.generate(tokens, past_key_values=cache, max_new_tokens=5, do_sample=False)
    text = model.generate(text, past_key_values=cache, max_new_tokens=5, do_sample=False)
    assert torch.equal(text, whole.generate(tokens, max_new_tokens=10, do_sample=False))


@torch.no_grad()
def test_a_cache_lies_with_its_layers_and_may_come_from_another_device(devices):
    first, second = devices
    whole, model, tokens, seq_idx = (
        hf_model().to(first), split(hf_model(), devices), random_tokens(2, 20).to(first), packed().to(first),
    )  # fmt: skip
    wanted = whole(tokens, seq_idx=seq_idx).logits
    astray = TaipanCache()
    astray.state = whole.model.new_cache(2, first, torch.float64)
    for cache in (TaipanCache(), astray):
        parts = [(0, 9, first), (9, 10, first), (10, 12, second), (12, 20, first)]
        logits = []
        for a, b, at in parts:
            given = {"inputs_embeds": whole.get_input_embeddings()(tokens[:, a:b]).to(at)} if at == second else {}
            given = given or {"input_ids": tokens[:, a:b]}
            cache.reorder_cache(torch.arange(2, device=at))
            logits.append(model(**given, seq_idx=seq_idx[:, a:b].to(at), past_key_values=cache).logits.to(first))
        same(torch.cat(logits, 1), wanted)
        places = [{t.device for t in state.tensors()} for state in cache.state.layers]
        assert places == [{devices[n % 2]} for n in range(len(places))]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("frugal", [True, False])  # recomputes layers, makes no logits
def test_a_training_step_is_that_of_one_device(devices, tied, frugal):
    first, second = devices
    tokens, seq_idx = random_tokens(2, 20).to(first), packed().to(first)
    options, results = {"tie_embeddings": tied, "gate": {"budget_lambda": 0.5}}, []
    for model in (hf_model(**options).to(first), split(hf_model(**options), devices)):
        model.train().model._set_gradient_checkpointing(frugal)
        labels, mask = tokens.to(first if not results else second), torch.ones_like(tokens)
        mask[:, 15:] = 0
        items = torch.tensor(50, device=first)
        output = model(tokens, mask, labels=labels, seq_idx=seq_idx, skip_logits=frugal, num_items_in_batch=items)
        assert frugal or output.loss.device == output.logits.device
        output.loss.backward()
        results.append((output.loss.detach(), *(p.grad for p in model.parameters())))
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found.to(first), wanted, rtol=1e-5, atol=1e-7)


def test_facts_are_copied_once_for_each_device(devices):
    first, second = devices
    settings = GateSettings(torch.tensor(0.5, device=first), 1.0, 0.0, False)
    tokens, step = torch.zeros(2, 20, device=first), torch.tensor(3, device=first)
    ctx = make_context(tokens, packed().to(first), None, step, settings)
    ctx.rotary = (tokens, tokens)  # as its first layer with rotary embeddings leaves it
    assert ctx.to(first) is ctx
    there = ctx.to(second)
    assert ctx.to(second) is there and there.to(second) is there
    facts = [there.seq_idx, there.position, there.document_start, there.samples, there.step, there.gate.capacity]
    assert {t.device for t in facts} == {second} and there.gate.tau == 1.0
    assert torch.equal(there.document_start.to(first), ctx.document_start)
    assert there.rotary is None  # which a layer there makes


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("where", ["second", "both"])
def test_kernels_run_where_the_tensors_are(where):
    """Triton launches on the current device, which stays the first."""
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device; these need two")
    devices = torch.device("cuda:0"), torch.device("cuda:1")
    tokens = random_tokens(2, 70)
    whole = hf_model(**SIZES).float()
    wanted = whole.to("cuda:0")(tokens.to("cuda:0")).logits.cpu()
    model = hf_model(**SIZES).float()
    model = model.to("cuda:1") if where == "second" else split(model, devices)
    at = model.get_input_embeddings().weight.device
    found = model(tokens.to(at)).logits.cpu()
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()
    text = whole.generate(tokens.to("cuda:0"), max_new_tokens=12, do_sample=False).cpu()
    assert torch.equal(model.generate(tokens.to(at), max_new_tokens=12, do_sample=False).cpu(), text)
    with torch.enable_grad():
        for m, place in ((whole, "cuda:0"), (model, at)):
            m(tokens.to(place)).logits.log_softmax(-1)[..., 0].mean().backward()
    for a, b in zip(whole.parameters(), model.parameters(), strict=True):
        if a.grad is not None:
            scale = a.grad.abs().max().clamp(min=1e-9).cpu()
            torch.testing.assert_close(b.grad.cpu() / scale, a.grad.cpu() / scale, rtol=0, atol=0.02)
    assert torch.cuda.current_device() == 0
