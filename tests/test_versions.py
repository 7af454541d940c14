"""Releases of transformers outside the accepted range are told in one line; setup.py and the pins are inside it."""

import re
import runpy
import warnings
from pathlib import Path

import pytest

from megatron_taipan.versions import TRANSFORMERS_NEWEST, TRANSFORMERS_OLDEST, check_transformers, is_untested, release

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


def test_every_pinned_release_is_accepted():
    pins = re.findall(r"^transformers==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert pins
    for pin in pins:
        assert release(pin) >= release(TRANSFORMERS_OLDEST) and not is_untested(pin)
