"""A checkpoint and an export written before the gate had options beyond the paper's still mean what they meant.

`before_gate_options/` was written by commit c965271 (torch 2.13, CPU): a run of 4 steps on data.bin, its checkpoint of
step 2, the export of step 4 without its bundled code, the log of the whole run, and logits that both gave.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from megatron_taipan.config_loading import load_config
from megatron_taipan.gate_config import GateConfig
from megatron_taipan.inference.loading import load_model
from megatron_taipan.layer_kinds.metrics import logged
from megatron_taipan.layer_kinds.selective import GATE_METRICS
from tests.distributed.launch import launch
from tests.train.runs import log, runs

MADE = Path(__file__).parent / "before_gate_options"


@pytest.mark.parametrize(("place", "name"), [("run/step_00000002", "step_2"), ("export", "export")])
def test_logits_are_what_they_were(place, name):
    model, _, _ = load_model(MADE / place)
    expected = load_file(MADE / "logits.safetensors")
    with torch.no_grad():
        logits = model(expected["tokens"]).logits
    assert (logits - expected[name]).norm() < 1e-6 * expected[name].norm()
    assert model.config.gate == GateConfig()  # the schema's defaults are the paper's


def test_the_run_goes_on_as_it_did(tmp_path, monkeypatch):
    shutil.copytree(MADE, tmp_path / "made")
    for copy in [tmp_path / "made", *(tmp_path / "made").rglob("*")]:
        copy.chmod(0o755 if copy.is_dir() else 0o644)  # a checkout may be read-only
    monkeypatch.chdir(tmp_path / "made")  # its paths are relative
    tree = yaml.safe_load(Path("config.yaml").read_text())
    assert "gate" not in tree["model"] and "input_gradient" not in Path("run/step_00000002/config.yaml").read_text()
    tree["checkpoint"]["dir"], tree["data"]["train"] = str(Path("run").resolve()), str(Path("data").resolve())
    assert launch(1, runs, [tree])[0] == [0]
    steps, before = log(Path("run")), [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in steps] == [3, 4]
    for ours, theirs in zip(steps, before[2:], strict=True):
        for key in ("loss", "ce", "budget", "grad_norm", "lr"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
        for metric in GATE_METRICS:  # named by the gate's number then
            (now,), (then,) = (list(logged(record, metric).values()) for record in (ours, theirs))
            assert now == pytest.approx(then, rel=1e-5), metric
    changed = [r["text"] for r in log(Path("run"), "changed")]  # nothing of the model
    names = [re.search(r"[a-z]+\.\w+", text)[0] for text in changed]
    assert names == ["data.train", "train.cuda_graphs", "checkpoint.dir"]
    assert "true, this run auto" in changed[1]  # the default since
    assert load_config("run/step_00000004/config.yaml").model.gate == GateConfig()
