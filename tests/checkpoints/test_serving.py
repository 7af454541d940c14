"""The map to a serving engine's layers: complete, and joined so that Mamba-2's reference computes our numbers."""

import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, Phi3Config, Phi3ForCausalLM
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.phi3 import modeling_phi3

from checkpoints.serving import mamba_state_shapes, mixer_arguments, served_weights
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.parameters import parameter_table
from tests.inference.networks import small_config
from tests.model.oracles import in_float64

# The parameters of vLLM's MambaMixer2, read from its source, not from an installed vLLM.
MIXER = {"in_proj.weight", "conv1d.weight", "conv1d.bias", "A", "D", "dt_bias", "norm.weight", "out_proj.weight"}


def test_every_parameter_is_in_one_place():
    network = small_config("M S W M A", tie_embeddings=False)
    joined = served_weights(network)
    parts = [part for tensor in joined.values() for part in tensor.parts]
    assert sorted(parts) == sorted(parameter_table(network))
    tensors = dict(Taipan(network).named_parameters())
    for name, tensor in joined.items():
        made = torch.cat([tensors[part] for part in tensor.parts])
        assert made.numel() == torch.Size(tensor.shape).numel() and made.shape[0] == tensor.shape[0], name
    of_mixer = {name.removeprefix("layers.0.mixer.") for name in joined if name.startswith("layers.0.mixer.")}
    assert of_mixer == MIXER
    assert {name for name in joined if name.startswith("layers.1.")} == {
        "layers.1.norm.weight", "layers.1.gate.weight", "layers.1.gate.bias", "layers.1.attention.qkv_proj.weight",
        "layers.1.attention.o_proj.weight", "layers.1.mlp_norm.weight", "layers.1.mlp.gate_up_proj.weight",
        "layers.1.mlp.down_proj.weight",
    }  # fmt: skip


def test_the_joined_mixer_computes_what_ours_does(monkeypatch):
    """Under the names and in the order of MambaMixer2, which transformers' Mamba-2 shares but for A and the prefix."""
    network = small_config("M*2", tie_embeddings=True)
    ours = Taipan(network, seed=1).double().eval()
    tensors = dict(ours.named_parameters())
    with torch.no_grad():
        for name, tensor in tensors.items():
            if "norm" in name or name.endswith((".D", "bias")):
                tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)) * 0.3)
    given = mixer_arguments(network)
    with in_float64(monkeypatch, modeling_mamba2):
        theirs = Mamba2ForCausalLM(
            Mamba2Config(
                vocab_size=network.vocab_size, hidden_size=given["hidden_size"], state_size=given["ssm_state_size"],
                num_heads=given["num_heads"], head_dim=given["head_dim"], expand=network.mamba.expand,
                n_groups=given["n_groups"], conv_kernel=given["conv_kernel_size"], num_hidden_layers=2,
                tie_word_embeddings=True, use_bias=given["use_bias"], use_conv_bias=given["use_conv_bias"],
                layer_norm_epsilon=given["rms_norm_eps"], hidden_act=given["activation"], residual_in_fp32=True,
            )
        ).double().eval()  # fmt: skip
        other = {"embedding.weight": "embeddings.weight", "final_norm.weight": "norm_f.weight"}
        loaded = {}
        for name, tensor in served_weights(network).items():
            place = other.get(name, name.replace(".mixer.A", ".mixer.A_log"))
            loaded[f"backbone.{place}"] = torch.cat([tensors[part] for part in tensor.parts]).view(tensor.shape)
        result = theirs.load_state_dict(loaded, strict=False)
        assert result.unexpected_keys == [] and set(result.missing_keys) <= {"lm_head.weight"}
        tokens = torch.arange(1, 25).view(2, 12) % network.vocab_size
        with torch.no_grad():
            wanted, found = theirs(tokens, use_cache=False).logits, ours(tokens).logits
    assert (found - wanted).abs().max() <= 1e-9 * wanted.abs().max()


def test_state_shapes_are_the_caches():
    network = small_config("M W", mamba={"n_groups": 2, "d_state": 8, "headdim": 8, "d_conv": 3})
    layers = Taipan(network).new_cache(5).layers
    assert [tuple(tensor.shape[1:]) for tensor in layers[0].tensors()] == list(mamba_state_shapes(network))


def test_the_joined_attention_and_mlp_compute_what_ours_do(monkeypatch):
    """Phi-3 of transformers joins the rows of q, k and v, and of gate and up, in the order of vLLM's layers."""
    network = small_config("A*2", tie_embeddings=False, attention={"n_heads": 4, "n_kv_heads": 2, "head_dim": 6})
    ours = Taipan(network, seed=1).double().eval()
    tensors = dict(ours.named_parameters())
    with in_float64(monkeypatch, modeling_phi3):
        theirs = Phi3ForCausalLM(
            Phi3Config(
                vocab_size=network.vocab_size, hidden_size=network.d_model, intermediate_size=network.d_ff,
                num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=network.norm_eps,
                tie_word_embeddings=False, pad_token_id=0, attn_implementation="eager",
                rope_parameters={"rope_type": "default", "rope_theta": network.attention.rope_theta},
            )
        ).double().eval()  # fmt: skip
        names = {
            "embedding.weight": "model.embed_tokens.weight", "final_norm.weight": "model.norm.weight",
            "head.weight": "lm_head.weight",
        }  # fmt: skip
        inside = {
            ".norm.": ".input_layernorm.",
            ".mlp_norm.": ".post_attention_layernorm.",
            ".attention.": ".self_attn.",
        }
        loaded = {}
        for name, tensor in served_weights(network).items():
            place = names.get(name, f"model.{name}")
            for our, their in inside.items():
                place = place.replace(our, their) if name not in names else place
            loaded[place] = torch.cat([tensors[part] for part in tensor.parts]).view(tensor.shape)
        theirs.load_state_dict(loaded)
        tokens = torch.arange(1, 25).view(2, 12) % network.vocab_size
        with torch.no_grad():
            wanted, found = theirs(tokens, use_cache=False).logits, ours(tokens).logits
    assert (found - wanted).abs().max() <= 1e-9 * wanted.abs().max()
