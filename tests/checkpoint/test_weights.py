"""A run that starts from a folder of weights scores what they score, in any layout; wrong folders are refused."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from checkpoints import import_hf
from megatron_taipan.checkpoint.opening import load_weights
from megatron_taipan.checkpoint.weights import open_weights
from megatron_taipan.config import make_config
from megatron_taipan.data.loader import build_dataset
from megatron_taipan.errors import UserError
from megatron_taipan.evaluation.perplexity import score
from megatron_taipan.model.taipan import Taipan
from tests.checkpoints.made import write_checkpoint
from tests.distributed.launch import run_program
from tests.train.runs import log
from tests.train.toy import toy_config, toy_tree, write_data


def write_weights(folder: Path, model: Taipan) -> Path:
    """The folder's format, written with the safetensors library."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"network": model.config.model_dump(mode="json")}))
    tensors = {f"model.{name}": tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_run_starts_from_the_weights_in_another_layout_and_resumes_from_its_own_checkpoint(tmp_path):
    tree = toy_tree(
        write_data(tmp_path / "data"),
        tmp_path / "run",
        parallel={"tensor": 2, "zero_stage": 3},
        train={"steps": 2, "eval_samples": 12},
        checkpoint={"init": str(tmp_path / "weights")},
    )
    config = make_config(tree)
    model = Taipan(config.model, seed=77)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    write_weights(tmp_path / "weights", model)
    wanted = score(model, build_dataset(config.data, "valid", config.model.vocab_size), samples=12)

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    command = ["launch/pretrain.py", "--config", str(tmp_path / "config.yaml")]
    run_program(2, [*command, "train.stop_at=1"]).succeeded()
    run_program(2, command).succeeded()
    valid = [record["ce"] for record in log(tmp_path / "run", "valid")]
    assert valid[0] == pytest.approx(wanted.ce, rel=2e-6)
    assert [record["step"] for record in log(tmp_path / "run")] == [1, 2]
    assert valid[-1] < valid[0]  # the second start went on; from the weights again it would score as before step 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pattern": "M S M W"}, "has the layers MSMA, model.pattern gives MSMW"),
        ({"d_ff": 64}, r"\[48, 32\].*\[64, 32\]"),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, changes, words):
    theirs = toy_config("none").model
    write_weights(tmp_path / "weights", Taipan(theirs))
    ours = theirs.model_copy(update=changes)
    with pytest.raises(UserError, match=words):
        load_weights(Taipan(ours), tmp_path / "weights")


def test_weights_for_a_network_that_computes_otherwise_are_taken_and_that_is_told(tmp_path):
    theirs = toy_config("none").model
    write_weights(tmp_path / "weights", Taipan(theirs))
    assert load_weights(Taipan(theirs), tmp_path / "weights") == []
    gate = theirs.gate.model_copy(update={"refinement": "add", "init_bias": 2.0, "capacity": 0.3})
    ours = theirs.model_copy(update={"gate": gate, "norm_eps": 1e-6, "pattern": "M S | M A"})
    assert load_weights(Taipan(ours), tmp_path / "weights") == [
        "model.norm_eps: 1e-05, this run 1e-06",
        "model.gate.refinement: replace, this run add",
    ]


def test_a_network_of_another_tokenizer_is_refused(tmp_path):
    for name in ("first", "second"):
        said = {"shards": [{"prefix": name}], "tokenizer": {"name": name, "sha256": name}}
        (tmp_path / f"{name}.json").write_text(json.dumps(said))
    config = make_config(toy_tree(str(tmp_path / "first"), tmp_path / "run"))
    model = Taipan(config.model, seed=1)
    path = write_checkpoint(tmp_path / "run", config, model.state_dict().__getitem__)
    assert load_weights(model, path, prefixes=[str(tmp_path / "first"), str(tmp_path / "unknown")]) == []
    with pytest.raises(UserError, match="second was made with the tokenizer second .* and .*first with first"):
        load_weights(model, path, prefixes=[str(tmp_path / "second")])


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="config.json cannot be read"):
        open_weights(tmp_path)
    folder = write_weights(tmp_path / "weights", Taipan(toy_config("none").model))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="no whole safetensors file"):
        open_weights(folder)
    file.unlink()
    with pytest.raises(UserError, match="holds no .safetensors"):
        open_weights(folder)
    for text, words in (
        ('{"model_type": "llama"}', "describes no Taipan"),
        ("[]", "describes no Taipan"),
        ('{"network": {"pattern": "M", "d_model": -1}}', r"config.json: network: \w+: "),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=words) as caught:
            open_weights(folder)
        assert "\n" not in str(caught.value)


def test_a_shard_that_was_never_copied_is_missed(tmp_path):
    """Its layers would else be drawn anew by an import."""
    folder = write_weights(tmp_path / "weights", Taipan(toy_config("none").model))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    late = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.3.")}
    save_file({n: t for n, t in tensors.items() if n not in late}, folder / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=f"lacks {len(late)} tensors of its network: layers.3.norm.weight"):
        open_weights(folder)
    assert import_hf.main([str(folder), str(tmp_path / "imported")]) == 2
    save_file(late, folder / "model-00002-of-00002.safetensors")
    assert set(open_weights(folder).names()) == {name.removeprefix("model.") for name in tensors}
