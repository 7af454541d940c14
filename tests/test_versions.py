"""Releases of transformers and torch that were not tried are told in one line; setup.py and the pins are inside."""

import re
import runpy
import warnings
from pathlib import Path

import pytest
import torch
from packaging.specifiers import SpecifierSet

from megatron_taipan.versions import (
    TORCH_NEWEST,
    TORCH_OLDEST,
    TRANSFORMERS_NEWEST,
    TRANSFORMERS_OLDEST,
    check_transformers,
    is_untested,
    release,
    untried_torch,
)

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.2.0", "5.2.0.dev0"])
def test_a_release_that_is_too_old_is_refused_in_one_line(version):
    with pytest.raises(ImportError) as caught:
        check_transformers(version)
    assert re.fullmatch(rf"transformers {version} is too old, .* {TRANSFORMERS_OLDEST} to .*", str(caught.value))


@pytest.mark.parametrize("version", ["5.25.0", "5.100.0", "6.0.0rc1"])
def test_a_release_that_was_never_run_is_warned_of_in_one_line(version):
    with pytest.warns(UserWarning, match=f"^transformers {version} is newer than .*{TRANSFORMERS_NEWEST}[^\n]*$"):
        check_transformers(version)


@pytest.mark.parametrize("version", ["5.3.0", "5.10.4", "5.24.0", "5.24.1.dev0"])
def test_accepted_releases_pass_silently(version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_transformers(version)


def test_setup_asks_for_the_oldest_accepted(monkeypatch):
    asked = {}
    monkeypatch.setattr("setuptools.setup", lambda **options: asked.update(options))
    runpy.run_path(str(ROOT / "setup.py"))
    assert f"transformers>={TRANSFORMERS_OLDEST},<6" in asked["install_requires"]
    (torch_range,) = (SpecifierSet(text[5:]) for text in asked["install_requires"] if re.match(r"torch\b", text))
    for version in ("2.10.0", "2.11.0+cu130", "2.13.1"):
        assert version in torch_range and not untried_torch(version), version
    for version in ("2.9.1", "2.14.0", "3.0.0"):
        assert version not in torch_range and untried_torch(version), version


@pytest.mark.parametrize(
    ("version", "side"),
    [("2.14.0+cu131", "newer"), ("2.15.0a0+git12", "newer"), ("3.0.0", "newer"), ("2.9.1", "older")],
)
def test_a_torch_that_was_not_tried_is_told_in_one_line(version, side):
    (text,) = untried_torch(version)
    assert text.startswith(f"torch {version} is {side} than what was tried ({TORCH_OLDEST} to {TORCH_NEWEST})")
    assert "\n" not in text and all((ROOT / name).is_file() for name in re.findall(r"tests/\S+\.py", text))


def test_the_installed_torch_was_tried():
    assert not untried_torch(torch.__version__), (
        f"{untried_torch(torch.__version__)}; once they pass, CPU and GPU, raise TORCH_NEWEST in versions.py"
    )


def test_every_pinned_release_is_accepted():
    pins = re.findall(r"^(transformers|torch)==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert {package for package, _ in pins} == {"transformers", "torch"}
    for package, pin in pins:
        if package == "torch":
            assert not untried_torch(pin)
        else:
            assert release(pin) >= release(TRANSFORMERS_OLDEST) and not is_untested(pin)
