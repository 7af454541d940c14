"""inspector, verify and diff on a real run's checkpoints, its damaged copies and folders of weights."""

import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from checkpoints import diff, inspector, verify
from checkpoints.run_metrics import last_validation
from megatron_taipan.model.taipan import Taipan
from tests.checkpoint.test_weights import write_weights
from tests.distributed.launch import run_program
from tests.inference.networks import small_config
from tests.train.toy import toy_tree, write_data


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two checkpoints of a run on two tensor ranks."""
    folder = tmp_path_factory.mktemp("looking")
    tree = toy_tree(
        write_data(folder / "data"),
        folder / "run",
        parallel={"tensor": 2},
        train={"steps": 2, "eval_samples": 2},
        checkpoint={"save_every": 1},
    )
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    run_program(2, ["launch/pretrain.py", "--config", str(folder / "config.yaml")]).succeeded()
    return folder / "run"


def test_inspect_says_what_is_there(run, capsys):
    assert inspector.main([str(run), "--tensors"]) == 0
    out = capsys.readouterr().out
    assert "step_00000001  complete" in out and "step_00000002  complete" in out
    assert re.search(r"progress +step 2, samples 16, tokens 512", out)
    assert "tensor 2" in out
    expected = sum(p.numel() for p in Taipan(small_config_of(run)).parameters())
    assert f"{expected:,} parameters" in out
    assert re.search(r"layers.1.attention.q_proj +\[32, 32\] +F32 +12.3 kB", out)  # 32 x 32 x 4 bytes, and two moments
    assert "float32 masters, exp_avg, exp_avg_sq" in out and "tensor 2, pipeline 1, data 1" in out
    assert inspector.main([str(run)]) == 0
    tree = capsys.readouterr().out
    assert re.search(
        r"layers\.\{0,2\}  2 x [\d.]+ kB\n +norm\n +weight +\[32\] +F32 +384 B\n +mixer\n +in_proj_z", tree
    )
    one = small_config_of(run).mamba_heads * 4 * 3
    assert re.search(rf"A_log +\[{small_config_of(run).mamba_heads}\] +F32 +{one} B", tree)


def test_the_cards_validation_is_the_one_that_the_run_told(run):
    """The run's own words, rounded, are in the text file of its rank 0."""
    found = last_validation(run / "step_00000002", 2)
    told = re.findall(
        r"step 2  validation loss ([\d.]+)  perplexity ([\d.]+)", (run / "logs/rank_00000.log").read_text()
    )
    assert (f"{found.loss:.4f}", f"{found.perplexity:.2f}") == told[-1]
    assert found.step == 2 and found.tokens > 0 and 0 <= found.selected <= 1


def small_config_of(run):
    from megatron_taipan.checkpoint.weights import open_checkpoint

    return open_checkpoint(run).config.model


def test_verify_finds_one_flipped_bit(run, tmp_path, capsys):
    assert verify.main([str(run)]) == 0
    assert capsys.readouterr().out.count("good (") == 2
    copy = tmp_path / "step_00000002"
    shutil.copytree(run / "step_00000002", copy)
    largest = max((copy / "state").iterdir(), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert verify.main([str(tmp_path)]) == 1
    assert f"state/{largest.name} changed since it was written" in capsys.readouterr().out
    largest.unlink()
    assert verify.main([str(copy)]) == 1
    assert f"{largest.name} is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "file, old, new",
    [
        ("state/index.json", b'"optimizer_step"', b'"optimizer_stop"'),
        ("state/rank_00000.safetensors", b"final_norm.weight|master", b"final_norm.weight|mastes"),
    ],
)
def test_damage_that_keeps_the_size_is_one_line(run, tmp_path, capsys, file, old, new):
    """Programs that only look check sizes, and meet what a hash would have told."""
    shutil.copytree(run / "step_00000002", tmp_path / "copy")
    content = (tmp_path / "copy" / file).read_bytes()
    assert old in content
    (tmp_path / "copy" / file).write_bytes(content.replace(old, new))
    assert diff.main([str(tmp_path / "copy"), str(run)]) == 2
    error = capsys.readouterr().err
    assert file in error and error.count("\n") == 1


def test_diff_of_a_checkpoint_with_itself_and_with_the_next(run, capsys):
    assert diff.main([str(run / "step_00000001"), str(run / "step_00000001")]) == 0
    assert re.fullmatch(r"(\d+) of \1 common tensors are bit-equal\n", capsys.readouterr().out)
    assert diff.main([str(run / "step_00000001"), str(run / "step_00000002"), "--all"]) == 1
    out = capsys.readouterr().out
    assert (
        "step: 1 | 2" in out and "layers.0.mixer.in_proj_z: " in out and "layers.0.mixer.in_proj_z (exp_avg): " in out
    )


def test_a_different_moment_is_a_difference(run, tmp_path, capsys):
    """Two states with the same weights are not the same state."""
    copy = tmp_path / "step_00000001"
    shutil.copytree(run / "step_00000001", copy)
    file = copy / "state" / "rank_00000.safetensors"
    tensors = load_file(file)
    tensors["final_norm.weight|exp_avg_sq"][0] += 1
    save_file(tensors, file)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["state/rank_00000.safetensors"]["bytes"] = file.stat().st_size
    (copy / "manifest.json").write_text(json.dumps(manifest))
    assert diff.main([str(run / "step_00000001"), str(copy)]) == 1
    assert "final_norm.weight (exp_avg_sq): 1 elements differ, by at most 1.000e+00" in capsys.readouterr().out


def test_diff_of_a_schedule_with_a_constant(tmp_path, capsys):
    schedule = {"start": 0.9, "end": 0.15}
    for name, capacity in (("a", schedule), ("b", 0.15), ("c", {**schedule, "until": 0.5})):
        write_weights(tmp_path / name, Taipan(small_config("M S", gate={"capacity": capacity}), seed=0))
    for other, words in (("b", "| 0.15"), ("c", "'until': 0.5")):
        diff.main([str(tmp_path / "a"), str(tmp_path / other)])
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("model.gate.capacity: ")]
        assert "'start': 0.9" in line and words in line


def test_diff_measures(tmp_path, capsys):
    model = Taipan(small_config("M S"), seed=1)
    first, second = (write_weights(tmp_path / name, model) for name in ("first", "second"))
    weights = load_file(second / "model.safetensors")
    norm = weights["model.final_norm.weight"]
    weights["model.final_norm.weight"] = norm + torch.tensor([0.5, *[0.0] * (len(norm) - 1)])
    save_file(weights, second / "model.safetensors")
    assert diff.main([str(first), str(second)]) == 1
    out = capsys.readouterr().out
    assert "final_norm.weight: 1 elements differ, by at most 5.000e-01, relative 1.021e-01" in out  # 0.5 / sqrt(24)
    weights["model.final_norm.weight"][0] = torch.nan
    save_file(weights, second / "model.safetensors")
    assert diff.main([str(first), str(second)]) == 1
    assert "by at most inf" in capsys.readouterr().out


def test_inspect_tells_the_size_of_weights_in_16_bits(tmp_path, capsys):
    folder = write_weights(tmp_path / "weights", Taipan(small_config("M S"), seed=1))
    weights = load_file(folder / "model.safetensors")
    for dtype, name in ((torch.bfloat16, "BF16"), (torch.float16, "F16")):
        save_file({key: value.to(dtype) for key, value in weights.items()}, folder / "model.safetensors")
        assert inspector.main([str(folder), "--tensors"]) == 0
        assert re.search(rf"final_norm.weight +\[24\] +{name} +48 B", capsys.readouterr().out)


@pytest.mark.parametrize("program", [inspector, verify, diff])
def test_what_is_no_checkpoint_is_one_line(program, tmp_path, capsys):
    arguments = [str(tmp_path / "none")] * (2 if program is diff else 1)
    assert program.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1
