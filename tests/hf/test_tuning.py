"""What tuning libraries build on: matrices as modules, embeddings in, hidden states out, a head that can grow.

The libraries themselves run in test_libraries.py.
"""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from megatron_taipan.hf import TaipanForSequenceClassification, TaipanModel
from megatron_taipan.hf.linears import MATRICES, table_name
from megatron_taipan.inference.loading import load_model
from megatron_taipan.model.context import step_context
from megatron_taipan.model.gate_settings import settled
from megatron_taipan.model.stream import Stream
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.parameters import parameter_table
from tests.hf.test_modeling import PATTERN, hf_model, naive_greedy, random_tokens
from tests.inference.networks import small_config
from tests.inference.test_decoding_gpu import SIZES


class Adapted(nn.Module):
    """Stands in for a linear layer as adapters do: adds a product with a matrix of its own."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base, self.delta = base, nn.Parameter(0.1 * torch.randn_like(base.weight))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + nn.functional.linear(x, self.delta)


def adapted(only: str | None = None):
    """A model whose matrices (or those of one name) are adapted, and the trainer's with the sums as its weights."""
    model, trainer = hf_model(), Taipan(small_config(PATTERN), seed=0).double().eval()
    weights = dict(trainer.named_parameters())
    for name, module in list(model.model.named_modules()):
        last = name.rpartition(".")[2]
        if last in MATRICES and only in (None, last):
            stand_in = Adapted(module).double()
            model.model.set_submodule(name, stand_in)
            weights[name].data += stand_in.delta.data
    return model, trainer


def steps(model, tokens: torch.Tensor, cache) -> torch.Tensor:
    """Logits [b, l, v] by `Taipan.step`, its layers those of a transformers model."""
    settings, logits = settled(model.model.gate_config), []
    for token in tokens.split(1, 1):
        cache.advance()
        stream, ctx = Stream(model.model.embedding(token)), step_context(token, cache, settings)
        for layer, state in zip(model.model.layers, cache.layers, strict=True):
            stream, _ = layer(stream, ctx, state)
        logits.append(model.lm_head(model.model.final_norm(stream.total())))
    return torch.cat(logits, 1)


@torch.no_grad()
@pytest.mark.parametrize("only", [None, "in_proj_B", "q_proj", "out_proj"])
def test_what_stands_in_for_a_matrix_acts_in_every_pass(only):
    model, trainer = adapted(only)
    tokens = random_tokens(2, 20)
    wanted = trainer(tokens).logits
    assert (wanted - hf_model()(tokens).logits).abs().max() > 0.01
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=0, atol=1e-10)
    cache = model.model.new_cache(2, tokens.device, torch.float64)
    torch.testing.assert_close(steps(model, tokens, cache), wanted, rtol=0, atol=1e-10)
    text = tokens
    for _ in range(8):
        text = torch.cat([text, trainer(text).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(model.generate(tokens, max_new_tokens=8, do_sample=False), text)


def test_gradients_reach_what_stands_in_for_a_matrix():
    model, trainer = adapted()
    tokens = random_tokens(2, 20)
    model.train()(tokens, labels=tokens).loss.backward()
    predicted = (torch.arange(20) < 19).double().expand(2, -1)
    trainer.train()(tokens, labels=tokens.roll(-1, 1), loss_mask=predicted, step=1).loss.backward()
    weights = {n: p for n, p in trainer.named_parameters() if n.rpartition(".")[2] in MATRICES}
    deltas = {n: m.delta for n, m in model.model.named_modules() if isinstance(m, Adapted)}
    assert deltas.keys() == weights.keys()
    for name, delta in deltas.items():
        torch.testing.assert_close(delta.grad, weights[name].grad, rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_a_hooked_matrix_is_called():
    """As offloading needs it: the weight may be nowhere outside the call."""
    model, tokens, called = hf_model(), random_tokens(2, 7), []
    wanted = model(tokens).logits
    for name, module in model.named_modules():
        if type(module) is nn.Linear:
            module.register_forward_pre_hook(lambda *_, name=name: called.append(name))
    torch.testing.assert_close(model(tokens).logits, wanted, rtol=0, atol=1e-12)
    assert sorted(called) == sorted(name for name, module in model.named_modules() if type(module) is nn.Linear)


@pytest.mark.parametrize("tied", [True, False])
def test_every_matrix_is_a_module_and_files_keep_the_trainers_names(tmp_path, tied):
    model = hf_model(tie_embeddings=tied).float()
    table = parameter_table(small_config(PATTERN, tie_embeddings=tied))
    assert {table_name(name) for name, _ in model.named_parameters()} == set(table)
    linears = {table_name(f"{name}.weight") for name, module in model.named_modules() if type(module) is nn.Linear}
    small = ("conv_", "embedding.", "gate.")  # matrices that are no product of tokens with a weight, or float32
    products = {name for name, spec in table.items() if len(spec.shape) == 2 and not any(s in name for s in small)}
    assert linears - {"head.weight"} == products - {"head.weight"}
    model.save_pretrained(tmp_path)
    trainer = Taipan(small_config(PATTERN, tie_embeddings=tied), seed=0)
    assert set(load_file(tmp_path / "model.safetensors")) == {f"model.{name}" for name in trainer.state_dict()}
    loaded, tokens = AutoModelForCausalLM.from_pretrained(tmp_path), random_tokens(2, 9)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    loaded.save_pretrained(tmp_path / "again")
    ours, _, _ = load_model(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, trainer.eval()(tokens).logits)
        assert torch.equal(ours(tokens).logits, loaded(tokens).logits)


@torch.no_grad()
def test_hidden_states_are_the_streams_between_layers():
    model, tokens, seen = hf_model(), random_tokens(2, 11), []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: seen.append(out[0].total())) for layer in model.model.layers
    ]
    plain = model.base_model(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    output = model(tokens, output_hidden_states=True)
    torch.testing.assert_close(output.hidden_states[1:-1], tuple(seen[:-1]), rtol=0, atol=1e-12)
    assert torch.equal(output.hidden_states[0], model.get_input_embeddings()(tokens))
    assert torch.equal(output.hidden_states[-1], plain.last_hidden_state) and plain.hidden_states is None
    head = model.get_output_embeddings()
    assert torch.equal(plain.last_hidden_state @ head.weight.T, output.logits) and head.bias is None
    assert len(output.hidden_states) == model.config.num_hidden_layers + 1


@torch.no_grad()
def test_embeddings_take_the_place_of_ids():
    model, tokens = hf_model(), random_tokens(2, 12)
    embedded = model.get_input_embeddings()(tokens)
    assert torch.equal(model(inputs_embeds=embedded, labels=tokens).loss, model(tokens, labels=tokens).loss)
    written = model.generate(inputs_embeds=embedded, max_new_tokens=6, do_sample=False)
    assert torch.equal(written, naive_greedy(model, tokens, 6)[:, 12:])


def test_the_loss_without_logits_has_the_same_gradients():
    results = []
    for skip in (False, True):
        model, tokens = hf_model().train(), random_tokens(2, 15)
        model.config.skip_logits = skip
        output = model(tokens, labels=tokens)
        assert (output.logits is None) == skip
        output.loss.backward()
        results.append((output.loss.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-8)
    assert model.eval()(tokens, labels=tokens).logits is not None


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_that_grows_keeps_its_logits(tmp_path, tied):
    model, tokens = hf_model(tie_embeddings=tied).float(), random_tokens(2, 9)
    with torch.no_grad():
        before = model(tokens).logits
        assert model.resize_token_embeddings(before.shape[-1] + 6).weight.shape[0] == before.shape[-1] + 6
        after = model(tokens).logits
        torch.testing.assert_close(after[..., : before.shape[-1]], before)
        assert after.shape[-1] == before.shape[-1] + 6
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        model.save_pretrained(tmp_path)
        for loaded in (AutoModelForCausalLM.from_pretrained(tmp_path), load_model(tmp_path)[0]):
            assert torch.equal(loaded(tokens).logits, after)


@torch.no_grad()
def test_other_heads_stand_on_the_same_network(tmp_path):
    model, tokens = hf_model().float(), random_tokens(3, 10)
    tokens[1, :4] = tokens[2, 7:] = model.config.pad_token_id
    mask = (tokens != model.config.pad_token_id).long()
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=4)
    assert type(base) is TaipanModel and type(classifier) is TaipanForSequenceClassification
    hidden = base(tokens, attention_mask=mask).last_hidden_state
    assert torch.equal(hidden, model.model(tokens, attention_mask=mask).last_hidden_state)
    last = torch.stack([hidden[0, 9], hidden[1, 9], hidden[2, 6]])
    output = classifier(tokens, attention_mask=mask, labels=torch.tensor([0, 3, 1]))
    torch.testing.assert_close(output.logits, last @ classifier.score.weight.T)
    assert output.loss.isfinite() and classifier.score.weight.std() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("threshold", [0.0, 1e9])  # of the gates: 1e9 selects no token
def test_what_stands_in_for_a_matrix_learns_on_a_gpu_as_on_the_cpu(threshold):
    gate, tokens, results = {"noise": "none", "threshold": threshold}, random_tokens(2, 70), []
    for device in ("cpu", "cuda"):
        model = hf_model(gate=gate, **SIZES).float().to(device)
        torch.manual_seed(0)
        for name, module in list(model.model.named_modules()):
            if name.rpartition(".")[2] in MATRICES:
                model.model.set_submodule(name, Adapted(module.cpu()).to(device))
        logits = model(tokens.to(device)).logits
        logits.log_softmax(-1)[..., 0].mean().backward()
        grads = [p.grad.cpu() for name, p in model.named_parameters() if name.endswith("delta") and p.grad is not None]
        results.append([t / t.abs().max().clamp(min=1e-9) for t in (logits.detach().cpu(), *grads)])
    torch.testing.assert_close(*results, rtol=0, atol=0.02)
