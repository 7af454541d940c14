"""Whole weights: merged from any layout they are the model that the trainer evaluated; damaged folders are refused."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints import export_hf, import_hf
from megatron_taipan.checkpoint.weights import open_checkpoint, open_export
from megatron_taipan.data.loader import build_dataset
from megatron_taipan.errors import UserError
from megatron_taipan.evaluation.perplexity import score
from megatron_taipan.inference.loading import load_model
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.parameters import parameter_table
from tests.checkpoints.made import read_all, write_weights
from tests.distributed.launch import launch
from tests.distributed.series import Job, launch_series
from tests.train.runs import log, runs
from tests.train.toy import toy_config, toy_tree, write_data

LAYOUTS = {
    "data, stage 1": {"zero_stage": 1},
    "data, stage 2": {"zero_stage": 2},
    "data, stage 3": {"zero_stage": 3},
    "tensor, stage 0": {"zero_stage": 0, "tensor": 2},
    "tensor, stage 1": {"zero_stage": 1, "tensor": 2},
    "tensor, stage 3": {"zero_stage": 3, "tensor": 2},
    "pipeline": {"zero_stage": 1, "pipeline": 2},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a run of each layout on two processes, three steps long, and two in bf16."""
    folder = tmp_path_factory.mktemp("merge")
    prefix = write_data(folder / "data")
    jobs = []
    for name, parallel in LAYOUTS.items():
        tree = toy_tree(prefix, folder / name, parallel=parallel, train={"steps": 3, "eval_samples": 12})
        jobs.append(Job(2, runs, [tree]))
    train = {"steps": 3, "eval_samples": 12, "precision": "bf16"}
    jobs.append(Job(2, runs, [toy_tree(prefix, folder / "bf16", train=train)]))
    # in bf16 the stages have different parameter groups: only one holds a gate, and with it a float32 matrix
    staged = {"zero_stage": 1, "pipeline": 2}
    tree = toy_tree(prefix, folder / "bf16 pipeline", train=train, parallel=staged)
    tree["model"] |= {"pattern": "M M | S M"}
    jobs.append(Job(2, runs, [tree]))
    assert all(results[0] == [0] for results in launch_series(jobs))
    return folder


def measured(run: Path) -> list[float]:
    """The trainer's validation losses."""
    return [record["ce"] for record in log(run, "valid")]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_model_scores_what_the_trainer_measured(trained, layout):
    losses = measured(trained / layout)
    assert losses[-1] < losses[0] - 0.05  # it learned, so initial weights cannot pass for the merged ones
    model, _, config = load_model(trained / layout)
    dataset = build_dataset(config.data, "valid", config.model.vocab_size)
    assert score(model, dataset, samples=12, batch=4).ce == pytest.approx(losses[-1], rel=2e-6)


@pytest.mark.parametrize("layout", ["pipeline", "tensor, stage 3"])
def test_an_export_of_any_layout_scores_the_same(trained, layout, tmp_path):
    assert export_hf.main([str(trained / layout), str(tmp_path / "hf")]) == 0
    model, _, _ = load_model(tmp_path / "hf")
    config = open_checkpoint(trained / layout).config
    dataset = build_dataset(config.data, "valid", config.model.vocab_size)
    assert score(model, dataset, samples=12, batch=4).ce == pytest.approx(measured(trained / layout)[-1], rel=2e-6)


def test_bf16_run_gives_its_float32_masters(trained, tmp_path):
    run = trained / "bf16"
    state = open_checkpoint(run)
    assert state.step == 3
    merged, table = read_all(run), parameter_table(state.config.model)
    assert list(merged) == [*table, "layers.1.gate.threshold"]
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        assert name not in table or tuple(tensor.shape) == table[name].shape
    matrix = merged["layers.0.mixer.in_proj_z"]
    assert (matrix.bfloat16().float() != matrix).any()  # finer than what bf16 holds
    # cast down again they are what the trainer computed with
    model, _, config = load_model(run, torch.bfloat16)
    dataset = build_dataset(config.data, "valid", config.model.vocab_size)
    assert score(model, dataset, samples=12, batch=2).ce == pytest.approx(measured(run)[-1], rel=1e-3)

    largest = max((state.path / "state").iterdir(), key=lambda file: file.stat().st_size)
    largest.unlink()
    with pytest.raises(UserError, match=f"{largest.name} is missing"):
        open_checkpoint(state.path)


def test_a_pipeline_in_bf16_is_merged_too(trained):
    run = trained / "bf16 pipeline"
    losses = measured(run)
    assert losses[-1] < losses[0] - 0.05
    model, _, config = load_model(run, torch.bfloat16)
    dataset = build_dataset(config.data, "valid", config.model.vocab_size)
    assert score(model, dataset, samples=12, batch=2).ce == pytest.approx(losses[-1], rel=1e-3)


def test_a_pipeline_in_bf16_goes_on_in_one_process(trained, tmp_path):
    """The pattern is cut no more, which does not make it another run."""
    steps = {"steps": 5, "eval_samples": 12, "precision": "bf16"}
    prefix, losses = str(trained / "data"), []
    for name, pipeline, pattern in (("two", 2, "M M | S M"), ("one", 1, "M*2 S M")):
        shutil.copytree(trained / "bf16 pipeline", tmp_path / name)
        tree = toy_tree(prefix, tmp_path / name, train=steps, parallel={"zero_stage": 1, "pipeline": pipeline})
        tree["model"] |= {"pattern": pattern}
        assert launch(pipeline, runs, [tree])[0] == [0]
        losses.append([record["loss"] for record in log(tmp_path / name)])
    assert len(losses[0]) == len(losses[1]) == 5
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(UserError, match="no complete checkpoint"):
        open_checkpoint(tmp_path)


def test_damaged_and_foreign_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="config.json cannot be read"):
        open_export(tmp_path)
    folder = write_weights(tmp_path / "weights", Taipan(toy_config("none").model))
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        open_export(folder)
    file.unlink()
    with pytest.raises(UserError, match="holds no .safetensors"):
        open_export(folder)
    for text, words in (
        ('{"model_type": "llama"}', "describes no Taipan"),
        ("[]", "describes no Taipan"),
        ('{"network": {"pattern": "M", "d_model": -1}}', r"config.json: network: \w+: "),
    ):
        (folder / "config.json").write_text(text)
        with pytest.raises(UserError, match=words) as caught:
            open_export(folder)
        assert "\n" not in str(caught.value)


def test_a_shard_that_was_never_copied_is_missed(tmp_path):
    """Its layers would else be drawn anew by an import."""
    folder = write_weights(tmp_path / "weights", Taipan(toy_config("none").model))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    late = {name: tensor for name, tensor in tensors.items() if name.startswith("model.layers.3.")}
    save_file({n: t for n, t in tensors.items() if n not in late}, folder / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=f"lacks {len(late)} tensors of its network: layers.3.norm.weight"):
        open_export(folder)
    assert import_hf.main([str(folder), str(tmp_path / "imported")]) == 2
    save_file(late, folder / "model-00002-of-00002.safetensors")
    assert set(open_export(folder).names()) == {name.removeprefix("model.") for name in tensors}
