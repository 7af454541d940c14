"""The transformers class: the trainer's numbers, generate() in every mode, loss, checkpointing, precision."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from megatron_taipan.hf import TaipanCache, TaipanConfig, TaipanForCausalLM
from megatron_taipan.hf.documents import documents_from_mask
from megatron_taipan.hf.modeling_taipan import CACHE
from megatron_taipan.model.taipan import Taipan
from tests.inference.networks import VOCABULARY, small_config

PATTERN = "M S W M A"


def hf_model(pattern: str = PATTERN, **changes) -> TaipanForCausalLM:
    """float64, evaluation mode; PAD = 0 is an ordinary token of the vocabulary."""
    config = TaipanConfig(network=small_config(pattern, **changes).model_dump(mode="json"), pad_token_id=0)
    torch.manual_seed(0)
    return TaipanForCausalLM(config).double().eval()


def random_tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def naive_greedy(model: TaipanForCausalLM, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """argmax over full forwards of the trainer's model, no cache, no generate()."""
    trainer = Taipan(model.config.model_config(), seed=0).double().eval()  # the initial weights, as `model` has them
    for _ in range(count):
        tokens = torch.cat([tokens, trainer(tokens).logits[:, -1:].argmax(-1)], 1)
    return tokens


def test_logits_are_the_trainers():
    model, tokens = hf_model(), random_tokens(2, 25)
    trainer = Taipan(small_config(PATTERN), seed=0).double().eval()
    at = torch.tensor([1, 4])
    with torch.no_grad():
        wanted = trainer(tokens).logits
        assert torch.equal(model(tokens).logits, wanted)
        for keep, kept in ((1, wanted[:, -1:]), (3, wanted[:, -3:]), (at, wanted[:, at])):
            torch.testing.assert_close(model(tokens, logits_to_keep=keep).logits, kept, rtol=0, atol=1e-12)


@pytest.mark.parametrize("pattern", ["M", "S", "A", PATTERN])
def test_greedy_equals_argmax_over_full_forwards(pattern):
    model, tokens = hf_model(pattern), random_tokens(3, 12)
    with torch.no_grad():
        wanted = naive_greedy(model, tokens, 15)
    assert torch.equal(model.generate(tokens, max_new_tokens=15, do_sample=False), wanted)
    assert torch.equal(model.generate(tokens, max_new_tokens=15, do_sample=False, use_cache=False), wanted)
    assert torch.equal(model.generate(tokens, max_new_tokens=15, do_sample=False, prefill_chunk_size=5), wanted)


@pytest.mark.parametrize(
    "options", [{}, {"num_return_sequences": 3}, {"length_penalty": 0.5, "repetition_penalty": 1.3}]
)
def test_beam_search_with_the_cache_equals_beam_search_without(options):
    model, tokens = hf_model(), random_tokens(2, 9)
    settings_ = {"max_new_tokens": 12, "num_beams": 4, "do_sample": False, **options}
    cached = model.generate(tokens, **settings_)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **settings_))
    assert not torch.equal(cached[:: options.get("num_return_sequences", 1)], model.generate(tokens, max_new_tokens=12))


def test_sampling_with_the_cache_equals_sampling_without():
    model, tokens = hf_model(), random_tokens(2, 9)
    results = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(model.generate(tokens, max_new_tokens=12, do_sample=True, top_p=0.9, use_cache=use_cache))
    assert torch.equal(*results)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 15), min_size=2, max_size=4), st.sampled_from([None, 4]), st.booleans())
def test_a_left_padded_batch_equals_single_prompts(lengths, chunk, beams):
    model, longest = hf_model(), max(lengths)
    prompts = [random_tokens(1, length, seed) for seed, length in enumerate(lengths)]
    batch = torch.cat([torch.nn.functional.pad(p, (longest - p.shape[1], 0)) for p in prompts])
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long()
    options = {"max_new_tokens": 7, "do_sample": False, "num_beams": 3 if beams else 1}
    got = model.generate(batch, attention_mask=mask, prefill_chunk_size=chunk, **options)
    for row, prompt in enumerate(prompts):
        assert torch.equal(got[row, longest:], model.generate(prompt, **options)[0, prompt.shape[1] :])


@pytest.mark.parametrize("pattern", ["M", "S", "A", PATTERN])
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_returned_cache_continues_the_text(pattern, name):
    """Under both names that transformers has for it, in recurrent layers too, which count no tokens in transformers."""
    model, tokens = hf_model(pattern), random_tokens(2, 20)
    with torch.no_grad():
        first = model(tokens[:, :13], use_cache=True)
        assert isinstance(first[CACHE], TaipanCache) and first[CACHE].get_seq_length() == 13
        rest = model(tokens[:, 13:], **{name: first[CACHE]})
        torch.testing.assert_close(rest.logits, model(tokens).logits[:, 13:], rtol=0, atol=1e-9)
    done = model.generate(tokens[:, :13], max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    more = model.generate(done.sequences, max_new_tokens=4, do_sample=False, **{name: done[CACHE]})
    assert torch.equal(more, naive_greedy(model, tokens[:, :13], 8))


@torch.no_grad()
def test_a_repeated_cache_holds_each_text_so_often_in_a_row():
    model, tokens = hf_model(), random_tokens(2, 20)
    cache = model(tokens[:, :13], use_cache=True)[CACHE]
    cache.batch_repeat_interleave(3)
    rest = model(tokens[[0, 0, 0, 1, 1, 1], 13:], cache=cache)
    wanted = model(tokens).logits[[0, 0, 0, 1, 1, 1], 13:]
    torch.testing.assert_close(rest.logits, wanted, rtol=0, atol=1e-9)


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens [2, 20] and their mask; the first row's text begins at 4."""
    mask = torch.ones(2, 20, dtype=torch.int64)
    mask[0, :4] = 0
    return random_tokens(2, 20), mask


@torch.no_grad()
def test_a_mask_of_the_new_tokens_continues_a_padded_text_or_is_refused():
    model, (tokens, mask) = hf_model(), left_padded()
    alone = model(tokens[:1, 4:]).logits[0, 9:]
    for new_mask in (mask, mask[:, 13:], None):
        cache = model(tokens[:, :13], attention_mask=mask[:, :13], use_cache=True)[CACHE]
        logits = model(tokens[:, 13:], attention_mask=new_mask, cache=cache).logits
        torch.testing.assert_close(logits[0], alone, rtol=0, atol=1e-9)
    cache = model(tokens[:, :13], attention_mask=mask[:, :13], use_cache=True)[CACHE]
    for wrong in (mask[:, 1:], mask[:1], mask[:, :13]):
        with pytest.raises(ValueError, match=r"must be \[2, 20\]: 13 cached tokens and 7 new"):
            model(tokens[:, 13:], attention_mask=wrong, cache=cache)
    with pytest.raises(ValueError, match="cover the 13 cached tokens"):
        model(tokens[:, 13:], attention_mask=mask[:, :7], cache=cache)
    assert cache.get_seq_length() == 13


@torch.no_grad()
def test_positions_that_start_again_pack_a_row():
    """As DataCollatorWithFlattening writes them: each text's logits and the loss are those of the text alone."""
    model, texts = hf_model(), [random_tokens(1, length, length)[0] for length in (5, 9, 7)]
    packed = torch.cat(texts)[None]
    positions = torch.cat([torch.arange(len(text)) for text in texts])[None]
    borders = torch.tensor([0, 5, 14, 21])
    logits = model(packed, position_ids=positions, cu_seq_lens_q=borders, cu_seq_lens_k=borders, max_length_q=9).logits
    torch.testing.assert_close(logits, torch.cat([model(text[None]).logits for text in texts], 1), rtol=0, atol=1e-9)
    losses = [model(text[None], labels=text[None]).loss * (len(text) - 1) for text in texts]
    loss = model(packed, position_ids=positions, labels=packed).loss
    assert loss.item() == pytest.approx(sum(losses).item() / 18, rel=1e-6)
    documents = torch.cat([torch.full_like(text, i) for i, text in enumerate(texts)])[None]
    assert torch.equal(model(packed, seq_idx=documents).logits, logits)
    with pytest.raises(ValueError, match="seq_idx"):
        model(packed, cu_seq_lens_q=borders, cu_seq_lens_k=borders)
    with pytest.raises(ValueError, match="seq_idx if padded or cached"):
        model(packed, position_ids=positions, use_cache=True)


@torch.no_grad()
def test_a_number_that_comes_again_is_another_document():
    """As where packed rows are padded with 0; at once and in parts, whose borders compare the caller's own numbers."""
    model, tokens = hf_model(), random_tokens(2, 21, 3)
    again = torch.tensor([[0] * 2 + [1] + [0] * 18, [5] * 9 + [3] * 4 + [5] * 8])
    rising = torch.tensor([[0] * 2 + [1] + [2] * 18, [0] * 9 + [1] * 4 + [2] * 8])
    expected = model(tokens, seq_idx=rising).logits
    assert torch.equal(model(tokens, seq_idx=again).logits, expected)
    cache = TaipanCache()
    parts = []
    for part in (slice(0, 11), slice(11, 16), slice(16, 21)):
        parts.append(model(tokens[:, part], seq_idx=again[:, part], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-9)


def test_positions_of_one_text_change_nothing():
    model, (tokens, mask) = hf_model(), left_padded()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    options = {"attention_mask": mask, "max_new_tokens": 7, "do_sample": False}
    got = model.generate(tokens, position_ids=positions, **options)
    assert torch.equal(got, model.generate(tokens, **options))
    assert torch.equal(got[:1, 4:], naive_greedy(model, tokens[:1, 4:], 7))


def test_evaluation_loss_is_the_shifted_cross_entropy():
    model, tokens = hf_model(), random_tokens(2, 15)
    labels = tokens.clone()
    labels[0, :4] = -100
    with torch.no_grad():
        output = model(tokens, labels=labels)
        wanted = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    assert output.loss.item() == pytest.approx(wanted.item(), rel=1e-6)


def test_evaluation_loss_of_padded_and_packed_rows_is_that_of_each_text_alone():
    """No label crosses a border: the first token of a text is predicted from nothing, here as in training."""
    model, (first, second) = hf_model(), random_tokens(2, 12)
    texts, total, count = [first[3:], second], 0.0, 0
    for text in texts:
        logits = model(text[None]).logits[0]
        total += torch.nn.functional.cross_entropy(logits[:-1], text[1:], reduction="sum").item()
        count += len(text) - 1
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, :3] = 0
    rows = torch.stack([first, second])
    assert model(rows, attention_mask=mask, labels=rows).loss.item() == pytest.approx(total / count, rel=1e-6)
    packed = torch.cat(texts)[None]
    documents = torch.cat([torch.full_like(text, i) for i, text in enumerate(texts)])[None]
    assert model(packed, seq_idx=documents, labels=packed).loss.item() == pytest.approx(total / count, rel=1e-6)


def test_training_loss_is_cross_entropy_plus_budget():
    model, tokens = hf_model().train(), random_tokens(2, 15)
    labels = tokens.clone()
    labels[0, :4] = -100
    loss = model(tokens, labels=labels).loss
    # the same noise: step 1, samples 0 and 1
    trainer = Taipan(small_config(PATTERN), seed=0).double().train()
    following = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], 1)
    mask = (following != -100).float()
    output = trainer(tokens, labels=following.clamp(min=0), loss_mask=mask.double(), step=1)
    assert output.budget_loss > 0
    assert loss.item() == pytest.approx((output.ce_loss + output.budget_loss).item(), rel=1e-9)


def test_losses_of_accumulated_batches_add_up_to_the_loss_of_one(monkeypatch):
    model, tokens = hf_model(), random_tokens(4, 15)
    model.train()
    monkeypatch.setattr(model.model.layers[1].gate, "training", False)  # no noise, which differs between the batches
    whole = model(tokens, labels=tokens).loss
    parts = [model(part, labels=part, num_items_in_batch=4 * 14).loss for part in tokens.split(2)]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-9)
    assert whole.item() > parts[0].item() > 0


def test_right_padding_changes_no_logits_and_no_loss():
    model, tokens = hf_model(), random_tokens(1, 12)
    padded = torch.nn.functional.pad(tokens, (0, 5))
    mask = (torch.arange(17) < 12).long()[None]
    with torch.no_grad():
        short, long = model(tokens, labels=tokens), model(padded, attention_mask=mask, labels=padded)
    torch.testing.assert_close(long.logits[:, :12], short.logits, rtol=0, atol=1e-9)
    assert long.loss.item() == pytest.approx(short.loss.item(), rel=1e-6)


def test_gradient_checkpointing_keeps_loss_and_gradients():
    results = []
    for enabled in (False, True):
        model, tokens = hf_model().train(), random_tokens(2, 15)
        if enabled:
            model.gradient_checkpointing_enable()
            assert model.model.gradient_checkpointing
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        results.append((loss.detach(), [p.grad for p in model.parameters()]))
        model.gradient_checkpointing_disable()
        assert not model.model.gradient_checkpointing
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)


def test_save_and_load_is_registered_and_exact(tmp_path):
    model, tokens = hf_model().float(), random_tokens(1, 20)
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), TaipanConfig)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, TaipanForCausalLM)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_bf16_keeps_its_float32_islands_through_loading_and_moving(tmp_path):
    model = hf_model().float()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for moved in (loaded, loaded.to("cpu"), loaded.to(torch.bfloat16)):
        named = {name.removesuffix(".weight"): tensor.dtype for name, tensor in moved.named_parameters()}
        kinds = {name.rpartition(".")[2]: dtype for name, dtype in named.items()}
        assert kinds["A_log"] == kinds["dt_bias"] == kinds["D"] == torch.float32
        assert kinds["in_proj_z"] == kinds["q_proj"] == torch.bfloat16
        assert moved.model.layers[1].gate.weight.dtype == moved.model.layers[1].gate.threshold.dtype == torch.float32
    out = loaded.generate(random_tokens(2, 5), max_new_tokens=5, do_sample=False)
    assert out.shape == (2, 10)


def test_a_weight_missing_from_the_file_gets_its_initial_value(tmp_path):
    from safetensors.torch import load_file, save_file

    hf_model().float().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    for name in ("model.layers.0.mixer.A_log", "model.layers.1.gate.threshold"):
        del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    fresh = Taipan(small_config(PATTERN), seed=0)
    assert torch.equal(loaded.model.layers[0].mixer.A_log, fresh.layers[0].mixer.A_log)
    assert torch.equal(loaded.model.layers[1].gate.threshold, fresh.layers[1].gate.threshold)


def test_masks_become_documents_or_are_refused():
    left = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert documents_from_mask(left, 2, 4).tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    assert documents_from_mask(left, 2, 2, past=2).tolist() == [[1, 1], [0, 0]]
    with pytest.raises(ValueError, match="not inside"):
        documents_from_mask(torch.tensor([[1, 1, 0, 1]]), 1, 4)
    with pytest.raises(ValueError, match="4-dimensional"):
        documents_from_mask(torch.ones(1, 1, 4, 4), 1, 4)


def test_what_does_not_apply_is_refused():
    model, tokens = hf_model("M"), random_tokens(1, 4)
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(tokens, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="two ways"):
        model(tokens, inputs_embeds=torch.zeros(1, 4, 24))
    with pytest.raises(ValueError, match=r"inputs_embeds is \[1, 24\].*d_model"):
        model(inputs_embeds=torch.zeros(1, 24))
    with pytest.raises(ValueError, match="TaipanCache"):
        model(tokens, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="two names"):
        model(tokens, past_key_values=TaipanCache(), cache=TaipanCache())


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [("atention_mask", "attention_mask"), ("seq_ids", "seq_idx"), ("label", "labels"), ("caches", "cache")],
)
def test_an_unknown_argument_is_refused_with_the_nearest_known(misspelt, meant):
    with pytest.raises(TypeError, match=f"'{misspelt}'; the nearest is '{meant}'"):
        hf_model("M")(random_tokens(1, 4), **{misspelt: None})


def test_what_a_taipan_cannot_give_is_refused_unless_it_is_not_wanted():
    model, tokens = hf_model("M"), random_tokens(1, 4)
    for name in ("output_attentions", "output_router_logits", "shift_labels"):
        for value in (None, False):
            assert torch.equal(model(tokens, **{name: value}).logits, model(tokens).logits)
        with pytest.raises(ValueError, match=f"does not support {name}: "):
            model(tokens, **{name: True if "output" in name else tokens})
    assert model(tokens, is_causal=True, cache_position=torch.arange(4)).logits.shape == (1, 4, VOCABULARY)
    with pytest.raises(ValueError, match="is_causal"):
        model(tokens, is_causal=False)
    with pytest.raises(ValueError, match="output_attentions"):
        model.generate(tokens, max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)


def test_tokens_and_caches_that_do_not_fit_are_refused():
    model, tokens = hf_model(), random_tokens(2, 8)
    for wrong in (tokens[:, :0], tokens[:0], tokens[0]):
        with pytest.raises(ValueError, match=r"input_ids is \[.*at least one token"):
            model(wrong)
    cache = model(tokens, use_cache=True)[CACHE]
    with pytest.raises(ValueError, match="holds 2 rows, but input_ids has 1"):
        model(tokens[:1], cache=cache)
    for text in (tokens, tokens[:, :5]):  # what the cache holds already, and less
        with pytest.raises(ValueError, match=f"holds 8 tokens a row and .* given {text.shape[1]}"):
            model.generate(text, past_key_values=cache, max_new_tokens=2)
