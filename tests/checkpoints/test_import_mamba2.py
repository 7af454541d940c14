"""Warm starts: imported Mamba-2 weights compute what their own library computes; the report is right."""

import json
import re
from dataclasses import fields, replace

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import BambaConfig, GraniteMoeHybridConfig, Mamba2Config, Mamba2ForCausalLM, PreTrainedConfig

from checkpoints import import_hf, import_mamba2
from checkpoints.foreign.hybrids import BAMBA, GRANITE
from checkpoints.foreign.mamba2 import TRANSFORMERS
from checkpoints.safetensors_files import write_sharded
from megatron_taipan.checkpoint.opening import load_weights
from megatron_taipan.checkpoint.weights import open_weights
from megatron_taipan.errors import UserError
from megatron_taipan.inference.loading import load_model
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.parallel.tensor import TensorParallel
from megatron_taipan.parameters import merge_shards, parameter_table
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


def write_mamba_ssm(folder, model, rows=50, tied=True, **changes) -> None:
    """`model` as mamba_ssm stores it: its names, the vocabulary padded to `rows`, the settings split in two."""
    folder.mkdir()
    state = {n.replace("embeddings", "embedding"): t.detach().clone() for n, t in model.state_dict().items()}
    for name in ("backbone.embedding.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], torch.zeros(rows - 50, 24)])
    torch.save(state, folder / "pytorch_model.bin")
    inner = {"layer": "Mamba2", "d_state": 8, "headdim": 8, "ngroups": model.config.n_groups}
    settings = {"d_model": 24, "n_layer": 3, "vocab_size": 50, "ssm_cfg": inner | changes.pop("ssm_cfg", {}),
                "attn_layer_idx": [], "rms_norm": True, "tie_embeddings": tied}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings | changes))


def change_settings(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_mamba_ssm_names_with_padded_vocabulary(tmp_path, source, capsys):
    model, _ = source
    write_mamba_ssm(tmp_path / "ssm", model, rows=56)
    arguments = [str(tmp_path / "ssm"), str(tmp_path / "out"), *write_config(tmp_path / "c.yaml")]
    assert import_mamba2.main(arguments) == 0
    ours, _, _ = load_model(tmp_path / "out")
    logits_agree(ours, model)
    out = capsys.readouterr().out
    assert "embedding.weight: the first 50 of 56 rows" in out and "lm_head.weight repeats backbone.embedding" in out
    assert re.search("logits agree with those of Mamba2ForCausalLM of transformers .* to .*e-0[678] ", out)


@pytest.mark.parametrize("library", ["transformers", "mamba_ssm"])
def test_a_head_of_its_own_is_imported_and_needs_a_place(tmp_path, capsys, library):
    model = their_model(tie_word_embeddings=False)
    if library == "transformers":
        model.save_pretrained(tmp_path / "theirs")
    else:
        write_mamba_ssm(tmp_path / "theirs", model, tied=False)
    capsys.readouterr()  # progress bars
    arguments = [str(tmp_path / "theirs"), str(tmp_path / "out"), *write_config(tmp_path / "c.yaml")]
    assert import_mamba2.main(arguments) == 2
    assert "set model.tie_embeddings=false" in capsys.readouterr().err
    assert import_mamba2.main([*arguments, "model.tie_embeddings=false"]) == 0
    ours, _, _ = load_model(tmp_path / "out")
    logits_agree(ours, model)


def test_a_tied_head_fits_an_untied_target(tmp_path, source):
    model, folder = source
    arguments = [*write_config(tmp_path / "c.yaml"), "model.tie_embeddings=false"]
    assert import_mamba2.main([str(folder), str(tmp_path / "out"), *arguments]) == 0
    ours, _, _ = load_model(tmp_path / "out")
    logits_agree(ours, model)


@pytest.mark.parametrize("library", ["transformers", "mamba_ssm"])
def test_several_groups_and_no_bias_of_the_convolution(tmp_path, library):
    model = their_model(n_groups=3, use_conv_bias=False)
    if library == "transformers":
        model.save_pretrained(tmp_path / "theirs")
    else:
        write_mamba_ssm(tmp_path / "theirs", model, ssm_cfg={"conv_bias": False})
    mamba = SIZES | {"n_groups": 3, "conv_bias": False}
    arguments = [str(tmp_path / "theirs"), str(tmp_path / "out"), *write_config(tmp_path / "c.yaml", mamba=mamba)]
    assert import_mamba2.main(arguments) == 0
    ours, _, _ = load_model(tmp_path / "out")
    logits_agree(ours, model)


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu' .*'silu'"),
        ({"use_bias": True}, "use_bias=True"),
        ({"use_bias": True, "hidden_act": "relu"}, "use_bias=True.*hidden_act='relu'|hidden_act='relu'.*use_bias=True"),
        ({"a_new_setting": 0.5}, "a_new_setting=0.5 .an unknown setting"),
    ],
)
def test_a_setting_that_computes_something_else_is_refused(tmp_path, capsys, changes, words):
    their_model(**changes).save_pretrained(tmp_path / "theirs")
    capsys.readouterr()  # progress bars
    arguments = [str(tmp_path / "theirs"), str(tmp_path / "out"), *write_config(tmp_path / "c.yaml")]
    assert import_mamba2.main(arguments) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"ssm_cfg": {"bias": True}},
        {"ssm_cfg": {"norm_before_gate": True}},
        {"ssm_cfg": {"dt_limit": [0.0, 0.5]}},
        {"ssm_cfg": {"rmsnorm": False}},
        {"ssm_cfg": {"D_has_hdim": True}},
        {"ssm_cfg": {"d_ssm": 24}},
        {"ssm_cfg": {"layer": "Mamba1"}},
        {"ssm_cfg": {"new": 1}},
        {"attn_layer_idx": [1]},
        {"d_intermediate": 64},
        {"rms_norm": False},
        {"bidirectional": True},
    ],
)
def test_a_setting_of_mamba_ssm_that_computes_something_else_is_refused(tmp_path, source, capsys, changes):
    inner = changes.get("ssm_cfg", changes)
    ((name, value),) = inner.items()
    write_mamba_ssm(tmp_path / "ssm", source[0], **changes)
    arguments = [str(tmp_path / "ssm"), str(tmp_path / "out"), *write_config(tmp_path / "c.yaml")]
    assert import_mamba2.main(arguments) == 2
    assert f"{'ssm_cfg.' * ('ssm_cfg' in changes)}{name}={value!r}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_settings_that_change_no_logit_do_not_matter(tmp_path, capsys):
    free = {"chunk_size": 5, "residual_in_fp32": False, "time_step_min": 0.01, "time_step_max": 0.2,
            "time_step_floor": 0.001, "time_step_rank": 7, "rescale_prenorm_residual": True, "hidden_act": "swish",
            "initializer_range": 0.2}  # fmt: skip
    model = their_model(**free)
    model.save_pretrained(tmp_path / "theirs")
    arguments = write_config(tmp_path / "c.yaml")
    change_settings(tmp_path / "theirs", norm_before_gate=True, rms_norm=True, torch_dtype="bfloat16")
    assert import_mamba2.main([str(tmp_path / "theirs"), str(tmp_path / "out"), *arguments]) == 0
    ours, _, _ = load_model(tmp_path / "out")
    logits_agree(ours, model)
    out = capsys.readouterr().out
    assert "config.json says norm_before_gate=True" in out and "rms_norm" not in out

    write_mamba_ssm(
        tmp_path / "ssm", model, residual_in_fp32=False, fused_add_norm=False, pad_vocab_size_multiple=2, attn_cfg={},
        ssm_cfg={"chunk_size": 5, "dt_limit": [0.0, float("inf")], "d_ssm": 48, "A_init_range": [1, 2]},
    )  # fmt: skip
    assert import_mamba2.main([str(tmp_path / "ssm"), str(tmp_path / "out2"), *arguments]) == 0


def test_every_setting_of_the_classes_stands_in_its_table():
    """A release of transformers with another setting must be read before it is pinned."""
    kinds = ((Mamba2Config, TRANSFORMERS), (GraniteMoeHybridConfig, GRANITE), (BambaConfig, BAMBA))
    for kind, rules in kinds:
        names = {field.name for field in fields(kind)} - {field.name for field in fields(PreTrainedConfig)}
        assert len(names) > 20 and not names - rules.taken - set(rules.only) - rules.free, kind


@pytest.mark.parametrize("setting", [{"hidden_act": "gelu"}, {"time_step_limit": (0.03, 0.05)}, {"use_bias": True}])
def test_what_the_tables_miss_the_logits_show(tmp_path, capsys, monkeypatch, setting):
    (name,) = setting
    open_table = replace(TRANSFORMERS, only={}, free=TRANSFORMERS.free | set(TRANSFORMERS.only))
    monkeypatch.setattr("checkpoints.foreign.mamba2.TRANSFORMERS", open_table)
    their_model(**setting).save_pretrained(tmp_path / "theirs")
    arguments = [str(tmp_path / "theirs"), str(tmp_path / "out"), *write_config(tmp_path / "c.yaml")]
    assert import_mamba2.main(arguments) == 2
    error = capsys.readouterr().err
    words = {"use_bias": "holds 6 tensors that this network has no place for"}
    assert words.get(name, "logits differ from those of Mamba2ForCausalLM") in error
    assert {path.name for path in tmp_path.iterdir()} == {"theirs", "c.yaml"}


@pytest.mark.parametrize("library", ["transformers", "mamba_ssm"])
def test_a_tensor_that_is_written_wrongly_is_noticed(tmp_path, source, capsys, monkeypatch, library):
    folder = source[1]
    if library == "mamba_ssm":
        write_mamba_ssm(folder := tmp_path / "ssm", source[0])

    def spoil(folder, tensors, load):
        write_sharded(folder, tensors, lambda name: load(name) + 0.01 * name.endswith("layers.3.mixer.D"))

    monkeypatch.setattr("checkpoints.map_weights.write_sharded", spoil)
    arguments = [str(folder), str(tmp_path / "out"), *write_config(tmp_path / "c.yaml", "M M S M")]
    assert import_mamba2.main(arguments) == 2
    assert "nothing was written" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("library", ["transformers", "mamba_ssm"])
def test_where_transformers_cannot_compute_it_that_is_said(tmp_path, capsys, monkeypatch, library):
    """Older releases have one gated norm for all groups."""
    monkeypatch.setattr("checkpoints.foreign.agreement._norms_groups", lambda model: False)
    model = their_model(n_groups=2)
    if library == "transformers":
        model.save_pretrained(tmp_path / "theirs")
    else:
        write_mamba_ssm(tmp_path / "theirs", model)
    arguments = write_config(tmp_path / "c.yaml", mamba=SIZES | {"n_groups": 2})
    assert import_mamba2.main([str(tmp_path / "theirs"), str(tmp_path / "out"), *arguments]) == 0
    assert "the logits were NOT compared with another implementation: Mamba2ForCausalLM" in capsys.readouterr().out


def test_tensors_without_a_place_are_refused(tmp_path, source, capsys):
    """The settings do not name them: nobody knows what they are for."""
    file = source[1] / "model.safetensors"
    whole = load_file(file)
    arguments = [str(source[1]), str(tmp_path / "out"), *write_config(tmp_path / "c.yaml")]
    for name, shape in (("backbone.layers.1.mixer.in_proj.bias", 118), ("backbone.layers.3.norm.weight", 24)):
        save_file(whole | {name: torch.ones(shape)}, file)
        assert import_mamba2.main(arguments) == 2
        assert f"holds 1 tensors that this network has no place for ({name})" in capsys.readouterr().err
    save_file(whole | {"lm_head.weight": whole["backbone.embeddings.weight"] + 0.1}, file)
    assert import_mamba2.main(arguments) == 2
    assert "lm_head.weight and backbone.embeddings.weight differ" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_another_copy_of_the_weights_is_not_opened(tmp_path, source):
    """As in Codestral's folder, which has Mistral's own file beside transformers'."""
    model, folder = source
    save_file({"other.names": torch.ones(3)}, folder / "consolidated.safetensors")
    assert import_mamba2.main([str(folder), str(tmp_path / "out"), *write_config(tmp_path / "c.yaml")]) == 0
    ours, _, _ = load_model(tmp_path / "out")
    logits_agree(ours, model)


def test_shards_and_one_that_is_not_there(tmp_path, source, capsys):
    model, _ = source
    model.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    arguments = [str(tmp_path / "shards"), str(tmp_path / "out"), *write_config(tmp_path / "c.yaml")]
    assert import_mamba2.main(arguments) == 0
    ours, _, _ = load_model(tmp_path / "out")
    logits_agree(ours, model)
    last = sorted((tmp_path / "shards").glob("*.safetensors"))[-1]
    last.unlink()
    capsys.readouterr()
    assert import_mamba2.main([arguments[0], str(tmp_path / "again"), *arguments[2:]]) == 2
    assert f"files: {last.name}" in capsys.readouterr().err


def test_weights_that_are_not_all_there_are_refused(tmp_path, source, capsys):
    """A shard that was never copied: its layers would else be drawn anew."""
    file = source[1] / "model.safetensors"
    whole = load_file(file)
    arguments = [str(source[1]), str(tmp_path / "ours"), *write_config(tmp_path / "c.yaml")]
    for missing, words in (
        ("backbone.layers.2.", "lacks 9 tensors"),
        ("backbone.layers.1.mixer.D", "lacks 1 tensors that its config.json calls for (backbone.layers.1.mixer.D)"),
        ("backbone.norm_f", "(backbone.norm_f.weight)"),
        ("backbone.embeddings", "lacks 1 tensors that its config.json calls for (backbone.embeddings.weight)"),
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
    for name, spec in parameter_table(weights.network, 2).items():
        assert torch.equal(merge_shards([state[name] for state in states], spec), weights.load(name)), name


def test_import_hf_keeps_an_export_and_fits_it_into_another_pattern(tmp_path, capsys):
    from checkpoints.map_weights import Source, map_weights

    state = memory_state("M S M")
    shapes = {name: tuple(tensor.shape) for name, tensor in state.weights.items()}
    map_weights(state.config.model, Source("MSM", shapes, state.load), tmp_path / "first", 0)
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
