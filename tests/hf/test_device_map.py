"""An exported folder that accelerate's `device_map` spreads over two devices answers as on one.

In a process that cannot import our package. The devices are two GPUs where there are any; elsewhere the CPU and a
pretended one (second_device.py), between which accelerate's own hooks move what they see.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoints.export_hf import export
from tests.checkpoints.made import memory_state
from tests.hf import placer
from tests.hf.test_libraries import install


def answers(scratch: Path) -> dict[str, dict]:
    """What `placer.py` answered."""
    folders = [f for f in os.environ.get("PYTHONPATH", "").split(os.pathsep) if f]  # packages may be there alone
    if importlib.util.find_spec("accelerate") is None:
        folders.append(str(install(scratch / "site", ["accelerate"])))
    site = os.pathsep.join(map(os.path.abspath, folders))
    export(memory_state("M S W M A M S M W A"), scratch / "hf")
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    env |= {"HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", placer.__file__, str(scratch / "hf"), site, str(scratch / "out.pt")]
    done = subprocess.run(command, cwd=scratch, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert not done.returncode, done.stderr[-3000:]
    return torch.load(scratch / "out.pt", weights_only=False)


WITHOUT_GRADIENTS = {"logits", "padded", "cached", "uncached", "beams"}


def compare(found: dict[str, dict]) -> None:
    """Every map against one device: the same texts; other numbers as near as float32 sums in another order are."""
    wanted = found.pop("one")
    assert len(wanted.pop("devices")) == 1
    for name, answer in found.items():
        devices = answer.pop("devices")
        assert len(devices) > 1 or name == "auto", f"{name}: all on {devices}"
        assert ("meta" in devices) == (name == "disk between"), f"{name}: on {devices}"
        assert answer.keys() == (wanted.keys() if "meta" not in devices else WITHOUT_GRADIENTS), name
        for key, value in answer.items():
            if value.dtype == torch.int64:
                assert torch.equal(value, wanted[key]), f"{name}: other tokens where generate() is {key}"
            else:
                difference, largest = (value - wanted[key]).abs().max(), wanted[key].abs().max()
                assert difference <= 1e-4 * largest, f"{name}: {key} differs by {difference}, its largest is {largest}"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="real devices are tried instead")
def test_two_pretended_devices(tmp_path):
    found = answers(tmp_path)
    assert found.keys() == {"one", "halves", "disk between"}
    compare(found)


@pytest.mark.gpu
def test_two_gpus(tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device; this needs two")
    found = answers(tmp_path)
    assert found.keys() == {"one", "halves", "disk between", "balanced", "auto"}
    compare(found)
