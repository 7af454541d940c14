"""Warm starts: imported Mamba-2 weights compute what their own library computes; the report is right."""

import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import Mamba2Config, Mamba2ForCausalLM

from checkpoints import import_hf, import_mamba2
from megatron_taipan.checkpoint.opening import load_weights
from megatron_taipan.checkpoint.weights import open_weights
from megatron_taipan.errors import UserError
from megatron_taipan.inference.loading import load_model
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.parallel.groups import TensorParallel
from megatron_taipan.parallel.layout import describe, merge_shards
from tests.checkpoints.made import memory_state

SIZES = {"d_state": 8, "headdim": 8, "n_groups": 1, "chunk_size": 8}


def write_config(path, pattern="M*3", **model) -> list[str]:
    tree = {
        "model": {"pattern": pattern, "vocab_size": 50, "d_model": 24, "d_ff": 32, "mamba": SIZES,
                  "attention": {"n_heads": 4, "window": 6}} | model,
        "data": {"train": "none"},
        "train": {"steps": 1, "global_batch": 1, "seed": 3},
        "checkpoint": {"dir": "unused"},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(tree))
    return ["--config", str(path)]


def their_model(**changes) -> Mamba2ForCausalLM:
    settings = {"num_heads": 6, "head_dim": 8, "vocab_size": 50, "hidden_size": 24, "state_size": 8, "n_groups": 1,
                "num_hidden_layers": 3, "chunk_size": 8, "tie_word_embeddings": True, "expand": 2}  # fmt: skip
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(Mamba2Config(**settings | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith((".D", "bias")):
                parameter.add_(torch.randn_like(parameter) * 0.3)  # ones and zeros would hide a swap
    return model


@pytest.fixture
def source(tmp_path):
    model = their_model()
    model.save_pretrained(tmp_path / "theirs")
    return model, tmp_path / "theirs"


def logits_agree(ours, theirs) -> None:
    tokens = torch.randint(0, 50, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = theirs.double()(tokens).logits
        # they compute norms in float32 whatever the model's type
        torch.testing.assert_close(ours.double()(tokens).logits.float(), wanted, rtol=0, atol=5e-6)
        assert wanted.std() > 0.1


def test_transformers_weights_give_transformers_logits(tmp_path, source, capsys):
    model, folder = source
    arguments = [*write_config(tmp_path / "c.yaml", vocab_size=9), "model.vocab_size=50"]
    assert import_mamba2.main([str(folder), str(tmp_path / "out"), *arguments]) == 0
    ours, _, _ = load_model(tmp_path / "out")
    logits_agree(ours, model)
    assert "new: 0 tensors" in capsys.readouterr().out


def test_mamba_ssm_names_with_padded_vocabulary(tmp_path, source, capsys):
    model, _ = source
    folder = tmp_path / "ssm"
    folder.mkdir()
    state = {n.replace("embeddings", "embedding"): t.detach().clone() for n, t in model.state_dict().items()}
    for name in ("backbone.embedding.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.zeros(6, 24)])
    torch.save(state, folder / "pytorch_model.bin")
    settings = {"d_model": 24, "n_layer": 3, "vocab_size": 50, "attn_layer_idx": [], "rms_norm": True,
                "ssm_cfg": {"layer": "Mamba2", "d_state": 8, "headdim": 8}, "tie_embeddings": True}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    assert import_mamba2.main([str(folder), str(tmp_path / "out"), *write_config(tmp_path / "c.yaml")]) == 0
    ours, _, _ = load_model(tmp_path / "out")
    logits_agree(ours, model)
    assert "embedding.weight: the first 50 of 56 rows" in capsys.readouterr().out


def test_hybrid_takes_blocks_in_order_and_draws_the_rest(tmp_path, source, capsys):
    model, folder = source
    arguments = write_config(tmp_path / "c.yaml", "M S M W")
    assert import_mamba2.main([str(folder), str(tmp_path / "out"), *arguments]) == 0
    weights = open_weights(tmp_path / "out")
    theirs = model.state_dict()
    fresh = Taipan(weights.network, seed=3).state_dict()
    for ours, layer in ((0, 0), (2, 1)):
        rows = theirs[f"backbone.layers.{layer}.mixer.in_proj.weight"]
        assert torch.equal(weights.load(f"layers.{ours}.mixer.in_proj_z"), rows[:48])
        assert torch.equal(weights.load(f"layers.{ours}.mixer.in_proj_dt"), rows[-6:])
        conv = theirs[f"backbone.layers.{layer}.mixer.conv1d.weight"]
        assert torch.equal(weights.load(f"layers.{ours}.mixer.conv_C_weight"), conv[-8:, 0])
    for name in ("layers.1.gate.weight", "layers.3.attention.q_proj", "layers.1.gate.threshold"):
        assert torch.equal(weights.load(name), fresh[name])
    out = capsys.readouterr().out
    assert "layers.{2}: norm.weight" in out.split("left in the source")[1]  # the third block had no place
    assert "gate.weight" in out.split("new:")[1].split("left in the source")[0]
    fresh_size = sum(t.numel() for name, t in fresh.items() if name.split(".")[1] in "13" and name.startswith("layers"))
    assert f"new: 21 tensors, {fresh_size:,} elements" in out


@pytest.mark.parametrize(
    ("changes", "model", "words"),
    [
        ({}, {"mamba": SIZES | {"d_state": 16}}, r"mamba\.d_state=8; the target has 16"),
        ({}, {"vocab_size": 60}, r"\[60, 24\] in the target, \[50, 24\]"),
        ({}, {"norm_eps": 1e-6}, "norm_eps=1e-05; the target has 1e-06"),
        ({"n_groups": 2, "state_size": 4}, {}, "d_state=4, mamba.n_groups=2; the target has 8, 1"),  # as many rows
        ({"time_step_limit": (0.01, 1.0)}, {}, r"time_step_limit=\[0.01, 1.0\] .*\(0.0, inf\)"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, capsys, changes, model, words):
    their_model(**changes).save_pretrained(tmp_path / "theirs")
    capsys.readouterr()  # progress bars
    arguments = [str(tmp_path / "theirs"), str(tmp_path / "out"), *write_config(tmp_path / "c.yaml", **model)]
    assert import_mamba2.main(arguments) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_all_there_are_refused(tmp_path, source, capsys):
    """A shard that was never copied: its layers would else be drawn anew."""
    file = source[1] / "model.safetensors"
    whole = load_file(file)
    arguments = [str(source[1]), str(tmp_path / "ours"), *write_config(tmp_path / "c.yaml")]
    for missing, words in (
        ("backbone.layers.2.", "lacks 9 tensors"),
        ("backbone.layers.1.mixer.D", "lacks 1 tensors that its config.json calls for (backbone.layers.1.mixer.D)"),
        ("backbone.norm_f", "(backbone.norm_f.weight)"),
        ("backbone.embeddings", "backbone.embeddings.weight"),
    ):
        save_file({name: tensor for name, tensor in whole.items() if not name.startswith(missing)}, file)
        assert import_mamba2.main(arguments) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "ours").exists()


def test_a_file_that_would_execute_code_is_refused(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.json").write_text('{"d_model": 24}')
    torch.save({"backbone.layers.0.norm.weight": Evil()}, tmp_path / "theirs/pytorch_model.bin")
    arguments = [str(tmp_path / "theirs"), str(tmp_path / "out"), *write_config(tmp_path / "c.yaml")]
    assert import_mamba2.main(arguments) == 2
    captured = capsys.readouterr()
    assert "executed" not in captured.out and "not a plain file of tensors" in captured.err


def test_weights_are_sliced_for_every_tensor_rank(tmp_path, source):
    _, folder = source
    arguments = write_config(tmp_path / "c.yaml", "M S M W")
    import_mamba2.main([str(folder), str(tmp_path / "out"), *arguments])
    weights = open_weights(tmp_path / "out")
    ranks = [Taipan(weights.network, seed=9, tensor_parallel=TensorParallel(2, rank)) for rank in range(2)]
    for model in ranks:
        load_weights(model, tmp_path / "out")
    states = [model.state_dict() for model in ranks]
    for name, spec in describe(weights.network, 2).items():
        assert torch.equal(merge_shards([state[name] for state in states], spec), weights.load(name)), name


def test_import_hf_keeps_an_export_and_fits_it_into_another_pattern(tmp_path, capsys):
    from checkpoints.transplant import Source, transplant

    state = memory_state("M S M")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.weights.items()}
    transplant(state.config.model, Source("MSM", shapes, state.load), tmp_path / "first", 0)
    assert import_hf.main([str(tmp_path / "first"), str(tmp_path / "same")]) == 0
    same = open_weights(tmp_path / "same")
    assert all(torch.equal(same.load(name), state.weights[name]) for name in state.weights)

    tree = state.config.model_dump(mode="json")
    tree["model"]["pattern"] = "M M M S"
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    assert import_hf.main([str(tmp_path / "first"), str(tmp_path / "other"), "--config", str(tmp_path / "c.yaml")]) == 0
    other = open_weights(tmp_path / "other")
    assert torch.equal(other.load("layers.1.mixer.out_proj"), state.weights["layers.2.mixer.out_proj"])
    assert torch.equal(other.load("layers.3.gate.threshold"), torch.tensor(0.125))
    assert torch.equal(other.load("layers.2.mixer.A_log"), Taipan(other.network, seed=1234).layers[2].mixer.A_log)
    assert "layers.{2}" in capsys.readouterr().out

    with pytest.raises(UserError, match="has the layers MSM"):
        load_weights(Taipan(other.network), tmp_path / "first")

    # without a configuration there is nothing that an option could override
    assert import_hf.main([str(tmp_path / "first"), str(tmp_path / "third"), "model.pattern=M"]) == 2
    assert "--config" in capsys.readouterr().err and not (tmp_path / "third").exists()
