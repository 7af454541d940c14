"""What diff, verify and imports must not pass over: other tensors, small differences, weights alone, seeds."""

import shutil

import torch
import yaml

from checkpoints import diff, import_hf, verify
from checkpoints.diff import tensor_difference
from megatron_taipan.checkpoint.weights import open_export
from megatron_taipan.model.taipan import Taipan
from tests.checkpoints.made import memory_state, write_checkpoint, write_weights
from tests.inference.networks import small_config


def test_tensors_of_one_side_only_are_a_difference(tmp_path, capsys):
    short = Taipan(small_config("M S"), seed=1)
    long = Taipan(small_config("M S M"), seed=2)
    long.load_state_dict(short.state_dict(), strict=False)
    for name, model in (("short", short), ("long", long)):
        write_weights(tmp_path / name, model)
    for order, only in ((("short", "long"), "B"), (("long", "short"), "A")):
        assert diff.main([str(tmp_path / name) for name in order]) == 1
        out = capsys.readouterr().out
        count = len(short.state_dict())
        assert f"only in {only}: layers.2." in out and f"{count} of {count} common tensors are bit-equal" in out


def test_the_smallest_difference_is_one_and_the_largest_is_shown_first(tmp_path, capsys):
    model = Taipan(small_config("M*3 S"), seed=1)
    write_weights(tmp_path / "a", model)
    gaps = {name: 2.0**-20 * (k + 1) for k, name in enumerate(n for n, _ in model.named_parameters() if ".norm." in n)}
    with torch.no_grad():
        for name, gap in gaps.items():
            model.get_parameter(name).add_(gap)
    write_weights(tmp_path / "b", model)
    assert diff.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    shown = [line for line in capsys.readouterr().out.splitlines() if "elements differ" in line]
    assert [line.split(":")[0] for line in shown] == sorted(gaps, key=gaps.__getitem__, reverse=True)
    assert all(f"by at most {gaps[line.split(':')[0]]:.3e}" in line for line in shown)


def test_differences_by_hand():
    x = torch.tensor([3.0, 4.0, torch.nan, torch.inf])
    assert tensor_difference("x", x, x.clone()) is None
    found = tensor_difference("x", torch.tensor([3.0, 4.0]), torch.tensor([3.0, 2.0]))
    assert (found.largest, found.relative, found.elements) == (2.0, 2.0 / 5.0, 1)
    for other in (torch.tensor([3.0]), torch.tensor([3.0, torch.nan]), torch.tensor([3.0, torch.inf])):
        assert tensor_difference("x", torch.tensor([3.0, 4.0]), other).largest == torch.inf


def test_weights_alone_are_verified_with_the_run(tmp_path, capsys):
    """checkpoint.save_weights_every writes them beside the full ones."""
    state = memory_state("M S")
    write_checkpoint(tmp_path, state.config, state.load)
    weights = write_checkpoint(tmp_path, state.config, state.load, moments=False)
    assert weights.name == "weights_00000007" and verify.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("good (") == 2
    file = weights / "state" / "rank_00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert verify.main([str(tmp_path)]) == 1
    assert "weights_00000007  state/rank_00000.safetensors changed" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "step_00000007")
    assert verify.main([str(tmp_path)]) == 1


def test_what_an_import_draws_follows_the_seed_of_the_new_run(tmp_path, capsys):
    state = memory_state("M")
    model = Taipan(state.config.model)
    model.load_state_dict(state.weights)
    write_weights(tmp_path / "theirs", model)
    target = small_config("M S", gate={"threshold": 0.5})
    tree = state.config.model_dump(mode="json") | {"model": target.model_dump(mode="json")}
    for seed in (0, 5):
        tree["train"]["seed"] = seed
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
        out = tmp_path / str(seed)
        assert import_hf.main([str(tmp_path / "theirs"), str(out), "--config", str(tmp_path / "c.yaml")]) == 0
        fresh, weights = Taipan(target, seed=seed).state_dict(), open_export(out)
        assert torch.equal(weights.load("layers.1.attention.q_proj"), fresh["layers.1.attention.q_proj"])
        assert weights.load("layers.1.gate.threshold") == 0.5
        assert torch.equal(weights.load("layers.0.mixer.D"), state.load("layers.0.mixer.D"))
