"""The wheel, installed into an empty environment away from the checkout, goes the whole way by its console scripts.

Dependencies are not installed again: the environment sees those of this one, without this one's megatron_taipan.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import yaml

from tests.checkpoints.made import ROOT, lines_of_text
from tests.train.toy import toy_tree

ROOMS = ("megatron_taipan", "data_prep", "checkpoints")


def copied(place: Path) -> Path:
    """What the wheel is built from, in a folder that the build may write into."""
    names = [str(file.relative_to(ROOT)) for room in (*ROOMS, "launch") for file in (ROOT / room).rglob("*")]
    for name in (*names, "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_file() and "__pycache__" not in name:
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            (place / name).write_bytes((ROOT / name).read_bytes())
    return place


def run(*command: str | Path, cwd: Path) -> str:
    """What it prints; it finds nothing by PYTHON... variables."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_MODULES_CACHE": str(cwd / "modules")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert not done.returncode, f"{command}: {done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-index"]
    run(*pip, "--no-deps", "--no-build-isolation", "-w", place / "out", copied(place / "tree"), cwd=place)
    (made,) = (place / "out").iterdir()
    return made


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_its_packages(wheel):
    tree = wheel.parents[1] / "tree"
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not re.match(r"[^/]*\.dist-info/", name)}
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        described = archive.read(metadata).decode()
    files = [file for room in ROOMS for file in (tree / room).rglob("*") if file.is_file()]
    presets = [file.name for file in (tree / "launch" / "configs").iterdir()]
    assert held == {str(file.relative_to(tree)) for file in files} | {f"megatron_taipan/configs/{n}" for n in presets}
    assert len(presets) > 15 and {name.split("/")[0] for name in held} == set(ROOMS)
    assert "Requires-Python: >=3.10" in described
    assert re.search(r"^Requires-Dist: torch<2\.14,>=2\.10$", described, re.M)


@pytest.mark.slow
def test_from_text_to_an_export_by_console_scripts(wheel, tmp_path):
    env, work = tmp_path / "env", tmp_path / "work"
    run(sys.executable, "-m", "venv", "--without-pip", env, cwd=tmp_path)
    (site,) = env.glob("lib/python*/site-packages")
    # A path in a .pth file is searched last, and .pth files there, those of editable installs, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", env / "bin" / "python", "--disable-pip-version-check", "install"]
    run(*pip, "--quiet", "--no-index", "--no-deps", wheel, cwd=tmp_path)
    found = run(env / "bin" / "python", "-I", "-c", "import megatron_taipan as m; print(m.__file__)", cwd=tmp_path)
    assert Path(found.strip()).is_relative_to(site)

    work.mkdir()
    documents = "\n".join(lines_of_text()).split("\n\n\n")[:1000]
    (work / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    tree = toy_tree("data", "run", train={"steps": 2, "global_batch": 2})
    tree["model"] |= {"pattern": "M S", "vocab_size": 400}
    tree["data"]["tokenizer"] = "tok.model"
    (work / "config.yaml").write_text(yaml.safe_dump(tree))
    scripts = env / "bin"
    run(scripts / "taipan-data", "train-tokenizer", "--input", "text.jsonl", "--vocab-size", "400",
        "--output", "tok.model", cwd=work)  # fmt: skip
    run(scripts / "taipan-data", "tokenize", "--input", "text.jsonl", "--tokenizer", "tok.model", "--append-eod",
        "--output", "data", cwd=work)  # fmt: skip
    preset = site / "megatron_taipan" / "configs" / "taipan_190m.yaml"
    planned = run(scripts / "taipan-pretrain", "--config", preset, "--dry-run", "--processes", "8", "data.train=data",
                  "data.tokenizer=tok.model", cwd=work)  # fmt: skip
    assert "187,520,022" in planned
    assert f"presets: {preset.parent}\n" in run(scripts / "taipan-pretrain", "--help", cwd=work)
    run(scripts / "taipan-pretrain", "--config", "config.yaml", cwd=work)
    run(scripts / "taipan-export", "run", "hf", cwd=work)
    assert (work / "run" / "step_00000002").is_dir() and (work / "hf" / "model.safetensors").is_file()
