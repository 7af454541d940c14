"""Calibrated thresholds give the wanted fraction on text that was not calibrated on."""

import pytest
import torch

from megatron_taipan.checkpoint.calibration import read_capacity, read_thresholds
from megatron_taipan.checkpoint.folder import locate
from megatron_taipan.data.loader import build_dataset
from megatron_taipan.errors import UserError
from megatron_taipan.evaluation import calibrate as calibration
from megatron_taipan.evaluation.calibrate import calibrate, main
from megatron_taipan.gate_config import Schedule
from megatron_taipan.inference.loading import load_model
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.model_config import AttentionConfig, MambaConfig, ModelConfig
from tests.distributed.launch import launch
from tests.train.runs import runs
from tests.train.toy import toy_config, toy_tree, write_data


def make_model(pattern: str) -> Taipan:
    config = ModelConfig(
        pattern=pattern, vocab_size=61, d_model=32, d_ff=32, init_std=0.3,
        mamba=MambaConfig(d_state=8, headdim=8, chunk_size=16), attention=AttentionConfig(n_heads=2, window=16),
    )  # fmt: skip
    return Taipan(config, seed=1)


def make_batches(seed: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 61, (4, 4, 64), generator=generator)
    return [{"tokens": t, "seq_idx": torch.zeros(4, 64, dtype=torch.int32)} for t in tokens]


def selected(model: Taipan, batches: list[dict[str, torch.Tensor]]) -> list[float]:
    """The mean share over the batches, of each S layer."""
    outs = [model.named_metrics(model(b["tokens"], seq_idx=b["seq_idx"])) for b in batches]
    shares = [model.layer_metrics.of_gates(out, "selected") for out in outs]
    return [torch.stack(layer).mean().item() for layer in zip(*shares, strict=True)]


@pytest.mark.parametrize("capacity", [0.15, 0.4])
def test_fraction_on_unseen_text(capacity):
    model = make_model("M S M S")
    calibrate(model, make_batches(0), capacity)
    model.eval()
    for layer, fraction in enumerate(selected(model, make_batches(1))):
        assert abs(fraction - capacity) < 0.05, (layer, fraction)


@pytest.mark.parametrize("documents", [1, 3])
def test_long_rows_are_read_in_parts(monkeypatch, documents):
    """With the thresholds that they have at once."""
    model, batches = make_model("M S W S"), make_batches(0)
    for batch in batches:
        batch["seq_idx"] = (torch.arange(64) * documents // 64).int().expand(4, 64) if documents > 1 else None
    wanted = calibrate(model, batches, 0.3)
    widths = []
    model.embedding.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    monkeypatch.setattr(calibration, "AT_ONCE", 24)
    assert calibrate(model, batches, 0.3) == pytest.approx(wanted, abs=1e-5)
    assert sorted(set(widths)) == [16, 24]


def test_without_a_capacity_it_is_what_the_models_schedule_ends_at():
    model = make_model("M S S")
    model.config.gate.capacity = Schedule(start=0.9, end=0.25)
    calibrate(model, make_batches(0))
    model.eval()
    assert selected(model, make_batches(0)) == pytest.approx([0.25] * 2, abs=1e-6)


def test_exact_fraction_on_the_text_itself_in_every_layer():
    """Fails when all layers are calibrated in one pass: the lower thresholds change what the upper layer sees."""
    model = make_model("M S S S")  # behind M, no two tokens have the same margin
    batches = make_batches(0)
    thresholds = calibrate(model, batches, 0.25)
    model.eval()
    assert selected(model, batches) == pytest.approx([0.25] * 3, abs=1e-6)
    assert len(set(thresholds)) == 3


@pytest.mark.parametrize(("capacity", "fraction"), [(0.0, 0.0), (1.0, 1.0)])
def test_ends_of_the_range(capacity, fraction):
    model = make_model("M S")
    calibrate(model, make_batches(0), capacity)
    model.eval()
    assert selected(model, make_batches(0)[:1]) == [fraction]


def test_a_model_without_gates_is_refused():
    with pytest.raises(UserError, match="no S layer"):
        calibrate(make_model("M W"), make_batches(0))


def test_program_stores_thresholds_that_later_loads_use(tmp_path, capsys):
    prefix = write_data(tmp_path / "data")
    assert launch(1, runs, [toy_tree(prefix, tmp_path / "run")])[0] == [0]
    before, _, _ = load_model(tmp_path / "run")
    assert main([str(tmp_path / "run"), "--samples", "8", "--capacity", "0.3"]) == 0
    assert "30% of 256 held-out tokens" in capsys.readouterr().out
    after, _, _ = load_model(tmp_path / "run")
    assert before.layers[1].gate.threshold.item() == 0.0
    tokens = build_dataset(toy_config(prefix).data, "valid", 64).batch(list(range(8)))
    with torch.no_grad():
        (share,) = selected(after.eval(), [tokens])
    assert share == pytest.approx(0.3, abs=0.01)
    assert read_capacity(locate(str(tmp_path / "run"))) == 0.3
    assert main([str(tmp_path / "run"), "--samples", "8"]) == 0  # the C that the run was trained for
    assert "15% of 256 held-out tokens" in capsys.readouterr().out
    assert read_capacity(locate(str(tmp_path / "run"))) == 0.15


def test_damaged_thresholds_are_an_error(tmp_path):
    (tmp_path / "calibration.json").write_text('{"thresholds": {"layers.1.gate.threshold": "high"}}')
    with pytest.raises(UserError, match="damaged"):
        read_thresholds(tmp_path)
    assert main([str(tmp_path)]) == 2


def test_batches_of_no_sample_are_refused(tmp_path, capsys):
    assert main([str(tmp_path), "--batch", "0"]) == 2
    assert "--batch=0" in capsys.readouterr().err


def test_an_export_is_sent_back_to_its_checkpoint(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert main([str(tmp_path)]) == 2
    assert "is an exported folder" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == [
        "config.json"
    ]


def test_a_gate_that_draws_at_random_has_nothing_to_calibrate():
    config = make_model("M S").config.model_copy(deep=True)
    config.gate.noise = "random"
    with pytest.raises(UserError, match=r"noise=random .* C is 0\.15"):
        calibrate(Taipan(config, seed=1), make_batches(0))
