"""Granite and Bamba folders: those that are stacks of `A` layers compute the same here; the others are refused."""

import re

import pytest
import torch
import yaml
from transformers import BambaConfig, BambaForCausalLM, GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

from checkpoints import import_mamba2
from megatron_taipan.checkpoint.weights import open_export
from megatron_taipan.inference.loading import load_model

SIZES = {
    "vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5, "mamba_n_heads": 6, "mamba_d_head": 8, "mamba_d_state": 8,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 700.0}
MULTIPLIERS = {
    "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 10.0, "attention_multiplier": 0.3,
}  # fmt: skip


def granite(**changes) -> GraniteMoeHybridForCausalLM:
    settings = {"shared_intermediate_size": 32, "num_local_experts": 0, "layer_types": ["full_attention"] * 3,
                "position_embedding_type": "rope", "rope_parameters": ROPE, "tie_word_embeddings": True,
                "attention_multiplier": 6**-0.5}  # fmt: skip
    return shaken(GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**SIZES | settings | changes)))


def bamba(rotary=1.0, **changes) -> BambaForCausalLM:
    rope = ROPE | {"partial_rotary_factor": rotary}
    settings = {"intermediate_size": 32, "attn_layer_indices": [0, 1, 2], "rope_parameters": rope}
    return shaken(BambaForCausalLM(BambaConfig(**SIZES | settings | changes)))


def shaken(model):
    """Every weight far enough from its initial value that a swap or a factor shows."""
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=made) * 0.2)
    return model.eval()


@pytest.fixture
def run(tmp_path, capsys):
    """Saves a model, imports it; gives the exit status, what was said, and the folder."""

    def imports(model, pattern="A*3", **changes) -> tuple[int, str]:
        model.save_pretrained(tmp_path / "theirs")
        capsys.readouterr()  # progress bars
        sizes = {"pattern": pattern, "vocab_size": 50, "d_model": 24, "d_ff": 32, "mamba": {"d_state": 8, "headdim": 8},
                 "attention": {"n_heads": 4, "n_kv_heads": 2, "rope_theta": 700.0, "window": 6}}  # fmt: skip
        tree = {"model": sizes | changes, "data": {"train": "none"}, "train": {"steps": 1, "global_batch": 1},
                "checkpoint": {"dir": "unused"}}  # fmt: skip
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
        arguments = [str(tmp_path / "theirs"), str(tmp_path / "out"), "--config", str(tmp_path / "c.yaml")]
        status = import_mamba2.main(arguments)
        captured = capsys.readouterr()
        assert status == 0 or not (tmp_path / "out").exists() and captured.err.count("\n") == 1
        return status, captured.out + captured.err

    return imports


def logits_agree(folder, theirs) -> None:
    ours, _, _ = load_model(folder)
    tokens = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, found = theirs(tokens).logits, ours(tokens).logits
    assert (found - wanted).abs().max() < 1e-5 * wanted.abs().max()
    assert wanted.std() > 0.05


@pytest.mark.parametrize(
    ("changes", "tied"),
    [({}, True), (MULTIPLIERS, False), (MULTIPLIERS | {"tie_word_embeddings": False}, False)],
)
def test_granite_of_attention_layers(tmp_path, run, changes, tied):
    model = granite(**changes)
    status, said = run(model, tie_embeddings=tied)
    assert status == 0, said
    assert "new: 0 tensors" in said and "agree with those of GraniteMoeHybridForCausalLM" in said
    logits_agree(tmp_path / "out", model)


def test_granites_layers_in_another_pattern(tmp_path, run):
    model = granite()
    status, said = run(model, "M A M A")
    assert status == 0 and "layers.{2}: attention.q_proj" in said.split("left in the source")[1]
    halves = model.state_dict()["model.layers.1.shared_mlp.input_linear.weight"].chunk(2)
    weights = open_export(tmp_path / "out")
    for name, half in zip(("gate_proj", "up_proj"), halves, strict=True):
        assert torch.equal(weights.load(f"layers.3.mlp.{name}"), half)


def test_bamba_of_attention_layers_whose_heads_turn_as_a_whole(tmp_path, run):
    model = bamba(tie_word_embeddings=True)
    assert run(model)[0] == 0
    logits_agree(tmp_path / "out", model)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: granite(layer_types=["linear_attention", "full_attention", "linear_attention"]),
         r"layers 0,2 are Mamba-2 with an MLP after them \(shared_mlp\), and M has none"),
        (lambda: granite(position_embedding_type="nope"), "position_embedding_type='nope'"),
        (lambda: granite(num_local_experts=2), "num_local_experts=2"),
        (lambda: granite(logits_scaling=0), "logits_scaling=0"),
        (lambda: granite(hidden_act="gelu"), "hidden_act='gelu'"),
        (lambda: granite(attention_bias=True), "attention_bias=True"),
        (lambda: granite(rope_parameters=ROPE | {"rope_type": "linear", "factor": 2.0}), "rope_type='linear'"),
        (lambda: granite(**MULTIPLIERS), "multiplied by 0.1 and 12.*model.tie_embeddings=false"),
        (lambda: bamba(0.5, attn_layer_indices=[1]),
         r"layers 0,2 are Mamba-2 with an MLP after them \(feed_forward\).*partial_rotary_factor=0.5"),
        (lambda: bamba(0.5), "partial_rotary_factor=0.5"),
        (lambda: bamba(mlp_bias=True), "mlp_bias=True"),
        (lambda: bamba(), "has a separate head"),
        (lambda: granite(rms_norm_eps=1e-6), "norm_eps=1e-06; the target has 1e-05"),
        (lambda: granite(num_key_value_heads=4), "n_kv_heads=4; the target has 2"),
    ],
)  # fmt: skip
def test_what_a_layers_do_not_compute_is_refused(run, model, words):
    status, said = run(model())
    assert status == 2 and re.search(words, said), said


def test_another_kind_of_model_is_refused(run):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4
    )
    status, said = run(LlamaForCausalLM(config))
    assert status == 2 and "model_type='llama'; known are mamba2" in said
