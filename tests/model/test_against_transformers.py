"""Whole networks against transformers' own, weights copied over, in float64: logits and every gradient."""

import pytest
import torch
from torch import Tensor, nn

from megatron_taipan.model.taipan import Taipan
from tests.model.oracles import in_float64
from tests.model.small import VOCABULARY, close, small_model, tokens

pytest.importorskip("transformers")


def random_loss(logits: Tensor) -> Tensor:
    """A scalar that every logit enters with another weight."""
    made = torch.Generator().manual_seed(3)
    return (logits * torch.randn(logits.shape, generator=made, dtype=logits.dtype)).sum()


def assert_same_gradients(pairs: dict[str, tuple[Tensor, Tensor]], ours: Taipan, theirs: nn.Module) -> None:
    """`pairs`: their parameter's name -> the gradient there and ours joined. No parameter of theirs is left out."""
    assert set(pairs) == {name for name, _ in theirs.named_parameters()}
    assert all(p.grad is not None for p in ours.parameters())
    for name, (expected, found) in pairs.items():
        assert expected.abs().max() > 1e-6, name
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def mamba_pairs(ours: Taipan) -> dict[str, list[tuple[nn.Module, list[str]]]]:
    """Their name -> our parameters that stand one after the other in it (mamba_ssm's order: z, x, B, C, dt)."""
    table = {
        "backbone.embeddings.weight": (ours.embedding, ["weight"]),
        "backbone.norm_f.weight": (ours.final_norm, ["weight"]),
    }
    for i, layer in enumerate(ours.layers):
        mixer, prefix = layer.mixer, f"backbone.layers.{i}"
        table[f"{prefix}.norm.weight"] = (layer.norm, ["weight"])
        table[f"{prefix}.mixer.in_proj.weight"] = (mixer, [f"in_proj_{c}" for c in ("z", "x", "B", "C", "dt")])
        table[f"{prefix}.mixer.conv1d.weight"] = (mixer, [f"conv_{c}_weight" for c in "xBC"])
        table[f"{prefix}.mixer.conv1d.bias"] = (mixer, [f"conv_{c}_bias" for c in "xBC"])
        table[f"{prefix}.mixer.norm.weight"] = (mixer, ["norm_weight"])
        table[f"{prefix}.mixer.out_proj.weight"] = (mixer, ["out_proj"])
        for name in ("A_log", "D", "dt_bias"):
            table[f"{prefix}.mixer.{name}"] = (mixer, [name])
    return table


@pytest.mark.parametrize("n_groups", [1, 2, 3])
@pytest.mark.parametrize("length", [5, 13])
def test_mamba2(monkeypatch, n_groups, length):
    from transformers import Mamba2Config, Mamba2ForCausalLM
    from transformers.models.mamba2 import modeling_mamba2

    ours = small_model("M*3", mamba={"n_groups": n_groups, "chunk_size": 4})
    config = Mamba2Config(
        vocab_size=VOCABULARY, hidden_size=24, state_size=8, num_heads=6, head_dim=8, expand=2, n_groups=n_groups,
        conv_kernel=4, chunk_size=7, num_hidden_layers=3, tie_word_embeddings=True, use_bias=False, use_conv_bias=True,
        layer_norm_epsilon=1e-5, residual_in_fp32=True,
    )  # fmt: skip
    with in_float64(monkeypatch, modeling_mamba2):
        theirs = Mamba2ForCausalLM(config).double().eval()
        table = mamba_pairs(ours)
        named = dict(theirs.named_parameters())
        with torch.no_grad():
            for name, (module, parts) in table.items():
                named[name].copy_(torch.cat([getattr(module, p) for p in parts]).view_as(named[name]))
        expected = theirs(input_ids=tokens(2, length), use_cache=False).logits
        random_loss(expected).backward()
    found = ours(tokens(2, length)).logits
    close(found, expected)
    random_loss(found).backward()
    pairs = {}
    for name, (module, parts) in table.items():
        joined = torch.cat([getattr(module, p).grad for p in parts])
        pairs[name] = (named[name].grad, joined.view_as(named[name].grad))
    assert_same_gradients(pairs, ours, theirs)


@pytest.mark.parametrize(("kv_heads", "tied"), [(4, True), (2, True), (1, False)])
def test_transformer_plus_plus_is_llama(monkeypatch, kv_heads, tied):
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.llama import modeling_llama

    ours = small_model("A*3", attention={"n_kv_heads": kv_heads, "rope_theta": 700.0}, tie_embeddings=tied)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=kv_heads, head_dim=6, rms_norm_eps=1e-5, tie_word_embeddings=tied, attention_bias=False,
        mlp_bias=False, rope_parameters={"rope_type": "default", "rope_theta": 700.0}, attn_implementation="eager",
    )  # fmt: skip
    with in_float64(monkeypatch, modeling_llama):
        theirs = LlamaForCausalLM(config).double().eval()
        table = {"model.embed_tokens.weight": ours.embedding.weight, "model.norm.weight": ours.final_norm.weight}
        if not tied:
            table["lm_head.weight"] = ours.head.weight
        for i, layer in enumerate(ours.layers):
            prefix = f"model.layers.{i}"
            table[f"{prefix}.input_layernorm.weight"] = layer.norm.weight
            table[f"{prefix}.post_attention_layernorm.weight"] = layer.mlp_norm.weight
            for their_name, our_name in zip("qkvo", ("q_proj", "k_proj", "v_proj", "out_proj"), strict=True):
                table[f"{prefix}.self_attn.{their_name}_proj.weight"] = getattr(layer.attention, our_name)
            for name in ("gate_proj", "up_proj", "down_proj"):
                table[f"{prefix}.mlp.{name}.weight"] = getattr(layer.mlp, name)
        named = dict(theirs.named_parameters())
        with torch.no_grad():
            for name, parameter in table.items():
                named[name].copy_(parameter)
        expected = theirs(input_ids=tokens(2, 17), use_cache=False).logits
        random_loss(expected).backward()
    found = ours(tokens(2, 17)).logits
    close(found, expected)
    random_loss(found).backward()
    assert_same_gradients({name: (named[name].grad, p.grad) for name, p in table.items()}, ours, theirs)
