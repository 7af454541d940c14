"""The flat folder of sources is complete and changes nothing but imports."""

import ast
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

import megatron_taipan
from checkpoints.bundle import REQUIRED, bundle_sources, flat_name


def test_transformers_finds_every_file_from_the_modeling_file(tmp_path):
    sources = bundle_sources()
    for name, text in sources.items():
        (tmp_path / name).write_text(text)
    needed = {Path(file).name for file in get_relative_import_files(tmp_path / "modeling_taipan.py")}
    assert needed | {"modeling_taipan.py"} == set(sources)
    assert needed >= {"taipan_model_taipan.py", "taipan_config.py", "taipan_ops_ssd.py", "configuration_taipan.py"}


@pytest.mark.parametrize("entry", ["configuration_taipan", "modeling_taipan"])
def test_each_entry_names_every_file_that_it_needs(tmp_path, entry):
    """transformers before 5.10 copies no more than these; the recursive search is that of the release installed."""
    for name, text in bundle_sources().items():
        (tmp_path / name).write_text(text)
    needed = {Path(file).stem for file in get_relative_import_files(tmp_path / f"{entry}.py")}
    assert needed and set(get_relative_imports(tmp_path / f"{entry}.py")) == needed


def test_no_file_needs_more_than_the_documented_packages(tmp_path):
    for name, text in bundle_sources().items():
        (tmp_path / name).write_text(text)
        assert set(get_imports(tmp_path / name)) <= REQUIRED | set(sys.stdlib_module_names), name


def test_only_lines_with_our_imports_differ_from_the_package():
    root = Path(megatron_taipan.__file__).parent
    originals = {flat_name(".".join(["megatron_taipan", *file.relative_to(root).with_suffix("").parts])): file
                 for file in root.rglob("*.py")}  # fmt: skip
    for name, text in bundle_sources().items():
        ast.parse(text)
        before = originals[name.removesuffix(".py")].read_text().split("\n")
        after = text.split("\n\nif False:")[0].split("\n")
        assert len(before) == len(after)
        changed = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
        kernels = "raise ImportError("
        for old, new in changed:
            assert "megatron_taipan" in old or kernels in text
            assert "from ." in new or new.strip().startswith(kernels) or not new.strip()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import megatron_taipan.config", "write `from"),
        ("from .config import x", "relative"),
        ("from megatron_taipan.ops import ssd", "is no module"),
    ],
)
def test_imports_that_cannot_be_made_flat_are_refused(tmp_path, monkeypatch, line, reason):
    from checkpoints import bundle

    (tmp_path / "ops").mkdir()
    (tmp_path / "odd.py").write_text(f"{line}\n")
    monkeypatch.setattr(bundle.megatron_taipan, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ImportError, match=reason):
        bundle_sources(("megatron_taipan.odd",))


def test_modules_that_need_other_packages_stay_behind(tmp_path, monkeypatch):
    from checkpoints import bundle

    (tmp_path / "ops").mkdir()
    (tmp_path / "ops/fast.py").write_text("import triton\n\ndef run(): ...\n")
    (tmp_path / "pick.py").write_text(
        "def load():\n    from megatron_taipan.ops.fast import (\n        run,\n    )\n\n    return run\n"
    )
    monkeypatch.setattr(bundle.megatron_taipan, "__file__", str(tmp_path / "__init__.py"))
    sources = bundle_sources(("megatron_taipan.pick",))
    assert list(sources) == ["taipan_pick.py"]
    space: dict = {}
    exec(sources["taipan_pick.py"], space)
    with pytest.raises(ImportError, match="install megatron_taipan"):
        space["load"]()
