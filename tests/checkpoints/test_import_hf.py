"""Our own weights in another network: what would read them otherwise is refused or said, and no tensor is lost."""

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from checkpoints import import_hf, verify
from checkpoints.map_weights import Source, map_weights
from checkpoints.safetensors_files import write_sharded
from megatron_taipan.inference.loading import load_model
from tests.checkpoints.made import memory_state


@pytest.fixture
def imports(tmp_path, capsys):
    """Writes a network, imports it with other options; gives the status and what was said. The folder is `out`."""

    def run(pattern="M S A", options=(), **changes) -> tuple[int, str]:
        state = memory_state(pattern, **changes)
        if not (tmp_path / "theirs").exists():
            shapes = {name: tuple(tensor.shape) for name, tensor in state.weights.items()}
            source = Source(state.config.model.letters, shapes, state.load)
            map_weights(state.config.model, source, tmp_path / "theirs", 0)
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(state.config.model_dump(mode="json")))
        arguments = [str(tmp_path / "theirs"), str(tmp_path / "out"), "--config", str(tmp_path / "c.yaml"), *options]
        capsys.readouterr()
        status = import_hf.main(arguments)
        captured = capsys.readouterr()
        assert status == 0 or not (tmp_path / "out").exists() and captured.err.count("\n") == 1
        return status, captured.out + captured.err

    return run


def logits(folder):
    model, _, _ = load_model(folder)
    tokens = torch.randint(0, model.config.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens).logits


def test_a_tied_head_becomes_one_of_its_own(tmp_path, imports):
    status, said = imports(options=["model.tie_embeddings=false"])
    assert status == 0 and "new: 0 tensors" in said and "logits agree with those of " in said
    assert torch.equal(logits(tmp_path / "out"), logits(tmp_path / "theirs"))


def test_a_head_of_its_own_needs_a_place(tmp_path, imports):
    status, said = imports(options=["model.tie_embeddings=true"], tie_embeddings=False)
    assert status == 2 and "has a separate head; set model.tie_embeddings=false" in said


def test_options_that_compute_something_else_are_said(imports):
    options = ["model.norm_eps=1e-3", "model.attention.window=3", "model.gate.weight=one"]
    status, said = imports(options=options)
    assert status == 0
    assert "note: norm_eps: 1e-05 in the source, 0.001 in the target" in said
    assert "note: attention.window: " in said and "note: gate.weight: alpha in the source, one in" in said


def test_options_that_read_the_weights_otherwise_are_refused(imports):
    """In both networks B and C have as many rows; only their meaning differs."""
    mamba = {"d_state": 8, "n_groups": 2, "headdim": 8}
    status, said = imports("M", ["model.mamba.d_state=16", "model.mamba.n_groups=1"], mamba=mamba)
    assert status == 2 and "mamba.d_state=8 (the target has 16), mamba.n_groups=2 (the target has 1)" in said


def test_tensors_that_the_network_does_not_have_are_refused(tmp_path, imports):
    assert imports()[0] == 0
    (tmp_path / "out").rename(tmp_path / "first")
    file = tmp_path / "theirs/model.safetensors"
    whole = load_file(file)
    for name in ("model.layers.0.mixer.in_proj_bias", "lm_head.weight"):
        save_file(whole | {name: torch.ones(3)}, file)
        status, said = imports()
        assert status == 2 and f"holds 1 tensors that its network does not have: {name.removeprefix('model.')}" in said
    save_file(whole | {"model.layers.0.mixer.D": torch.ones(5)}, file)
    status, said = imports()
    assert status == 2 and "layers.0.mixer.D has shape [5]" in said


def test_a_tensor_that_is_written_wrongly_is_noticed(imports, monkeypatch):
    def spoil(folder, tensors, load):
        write_sharded(folder, tensors, lambda name: load(name) + 0.01 * name.endswith("layers.0.mixer.D"))

    monkeypatch.setattr("checkpoints.map_weights.write_sharded", spoil)
    status, said = imports("S A M", ["model.pattern=M S A"])
    assert status == 2 and "logits differ" in said and "nothing was written" in said


def test_what_a_killed_import_left_goes_with_the_next(tmp_path, imports):
    left = tmp_path / ".out.abcdefgh.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    status, said = imports()
    assert status == 0 and f"note: removed {left}, which a killed program had left" in said
    assert not left.exists() and verify.main([str(tmp_path / "out")]) == 0
