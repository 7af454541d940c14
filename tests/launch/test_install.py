"""launch/install.sh updates an environment that is there and keeps the torch that belongs there; pip is a stand-in."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = "--editable .[dev]" if os.access(ROOT, os.W_OK) else "[dev]"
PINNED = re.search(r"^torch==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)[1]


def stand_in(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def install(tmp_path: Path, *, torch: str | None, gpu: bool, environment: bool = True, checkout: Path = ROOT) -> str:
    """What pip and venv were called with, a call a line, where that torch is installed."""
    calls, venv = tmp_path / "calls", tmp_path / "venv"
    show = f'echo "Version: {torch}"' if torch else "exit 1"
    python = f"""case "$*" in
    *pip*show*) {show} ;;
    *venv*) echo "$*" >> {calls}; mkdir -p {venv}/bin; cp "$0" {venv}/bin/python ;;
    *pip*) echo "$*" >> {calls} ;;
    *"import torch"*) ;;
    *) exec {sys.executable} "$@" ;;
esac"""
    stand_in(tmp_path / "bin" / "python", python)
    stand_in(tmp_path / "bin" / "nvidia-smi", 'echo "GPU 0: NVIDIA H100"' if gpu else "exit 9")
    if environment:
        stand_in(venv / "bin" / "python", python)
    env = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    command = ["bash", str(checkout / "launch" / "install.sh"), "python", str(venv)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return calls.read_text()


def test_a_new_environment_gets_the_pinned_torch_first(tmp_path):
    first, second, *others = install(tmp_path, torch=None, gpu=False, environment=False).splitlines()
    assert "venv --clear" in first
    assert f"torch=={PINNED}+cpu" in second
    assert any(OURS in call for call in others)


@pytest.mark.parametrize("build", ["", "+cpu", "+cu128"])
def test_an_environment_that_is_there_is_not_cleared_and_keeps_its_torch_where_no_gpu_answers(tmp_path, build):
    calls = install(tmp_path, torch=PINNED + build, gpu=False)
    assert "venv" not in calls.replace(str(tmp_path / "venv"), "") and "torch==" not in calls
    assert OURS in calls


def test_another_version_than_the_pinned_is_replaced(tmp_path):
    assert f"torch=={PINNED}" in install(tmp_path, torch="2.10.0+cpu", gpu=False)


def test_a_cpu_build_makes_room_where_a_gpu_answers(tmp_path):
    calls = install(tmp_path / "cpu", torch=f"{PINNED}+cpu", gpu=True)
    assert calls.index("uninstall") < calls.index(f"torch=={PINNED}")
    assert "uninstall" not in install(tmp_path / "cuda", torch=f"{PINNED}+cu128", gpu=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write into every folder")
def test_nothing_is_written_into_a_checkout_of_others(tmp_path):
    checkout = tmp_path / "checkout"
    for name in ("launch/install.sh", "constraints.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, checkout / name)
    for room in ("megatron_taipan", "data_prep", "checkpoints"):
        (checkout / room).mkdir()
    checkout.chmod(0o555)
    *_, ours, _ = install(tmp_path, torch=PINNED, gpu=False, checkout=checkout).splitlines()
    assert "--editable" not in ours and ours.endswith("[dev]") and str(checkout) not in ours
