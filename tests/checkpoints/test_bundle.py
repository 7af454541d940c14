"""The flat folder of sources is complete, holds the network alone, and changes nothing but imports."""

import ast
import re
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

import megatron_taipan
from checkpoints.bundle import FILES, REQUIRED, bundle_sources

ROOT = Path(megatron_taipan.__file__).parent


def written(folder: Path) -> list[Path]:
    """The export's source files."""
    for name, text in bundle_sources().items():
        (folder / name).write_text(text)
    return sorted(folder.iterdir())


def test_transformers_finds_every_file_from_the_modeling_file(tmp_path):
    files = {path.name for path in written(tmp_path)}
    needed = {Path(file).name for file in get_relative_import_files(tmp_path / "modeling_taipan.py")}
    assert needed | {"modeling_taipan.py"} == files
    assert needed >= {"taipan_mamba2.py", "taipan_config.py", "taipan_ops.py", "configuration_taipan.py"}


@pytest.mark.parametrize("entry", ["configuration_taipan", "modeling_taipan"])
def test_each_entry_names_every_file_that_it_needs(tmp_path, entry):
    """transformers before 5.10 copies no more than these; the recursive search is that of the release installed."""
    written(tmp_path)
    needed = {Path(file).stem for file in get_relative_import_files(tmp_path / f"{entry}.py")}
    assert needed and set(get_relative_imports(tmp_path / f"{entry}.py")) == needed


def test_no_file_needs_more_than_the_documented_packages(tmp_path):
    for path in written(tmp_path):
        assert set(get_imports(path)) <= REQUIRED | set(sys.stdlib_module_names), path.name


def test_an_export_is_a_dozen_files_without_the_trainer():
    sources = bundle_sources()
    assert len(sources) <= 12 and sum(text.count("\n") for text in sources.values()) < 4250
    trainers = "deepspeed|torch.distributed|ProcessGroup|all_gather_into_tensor|CUDAGraph|make_graphed|triton|yaml"
    for name, text in sources.items():
        code = ast.unparse(ast.parse(text))  # comments may name them
        assert not re.search(trainers, code), f"{name}: {re.search(trainers, code)[0]}"
    held = {module for modules in FILES.values() for module in modules}
    assert {m for m in held if m.startswith("parallel.")} == {"parallel.one_rank"}
    assert not held & {"config", "model.taipan", "model.graphs", "model.recompute", "ops.dispatch", "ops.fast"}


def is_import(node: ast.stmt) -> bool:
    """Also where it is for types, or stands in the list for old releases of transformers."""
    for_types = isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "False")
    return isinstance(node, ast.Import | ast.ImportFrom) or for_types


def statements(text: str) -> list[str]:
    """What the text does at its top level, but for imports."""
    body = ast.parse(text).body
    return [ast.dump(n) for n in body[ast.get_docstring(ast.parse(text)) is not None :] if not is_import(n)]


def test_files_hold_the_packages_statements_in_order_and_no_others():
    for name, text in bundle_sources().items():
        originals = [ROOT.joinpath(*m.split(".")).with_suffix(".py").read_text() for m in FILES[name[:-3]]]
        assert statements(text) == [s for original in originals for s in statements(original)], name
        for original in originals:  # comments and all
            first = max((n.end_lineno for n in ast.parse(original).body if is_import(n)), default=1)
            assert "\n".join(original.split("\n")[first:]).strip("\n") in text, name


def test_names_mean_in_a_file_what_they_mean_in_the_package():
    """Every import of a module is, in its file, an import of the same name or a statement of the same file."""
    where = {module: name for name, modules in FILES.items() for module in modules}
    for name, text in bundle_sources().items():
        tree = ast.parse(text)
        imported = {(n.module, a.name, a.asname) for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
        for module in FILES[name.removesuffix(".py")]:
            for node in ast.parse(ROOT.joinpath(*module.split(".")).with_suffix(".py").read_text()).body:
                if not isinstance(node, ast.ImportFrom):
                    continue
                place = where.get(node.module.removeprefix("megatron_taipan."), node.module)
                for alias in node.names:
                    here = place == name.removesuffix(".py") or alias.name == "TYPE_CHECKING"
                    assert here or (place, alias.name, alias.asname) in imported, (name, module, alias.name)


@pytest.fixture
def house(tmp_path, monkeypatch):
    """A package of two files: `house(a, b)` joins their texts into one file of an export, and gives that."""
    from checkpoints import bundle

    def join(first: str, second: str) -> str:
        (tmp_path / "ops").mkdir()
        (tmp_path / "a.py").write_text(first)
        (tmp_path / "b.py").write_text(second)
        return bundle_sources({"both": ("a", "b")})["both.py"]

    monkeypatch.setattr(bundle.megatron_taipan, "__file__", str(tmp_path / "__init__.py"))
    return join


def test_joined_files_run(house):
    text = house(
        '"""First."""\n\nimport math as m\nfrom typing import TYPE_CHECKING\n\n'
        "if TYPE_CHECKING:\n    import nothing\n\nTWO = m.ceil(1.5)\n",
        '"""Second."""\n\nfrom pathlib import Path\n\nfrom megatron_taipan.a import TWO\n\n# Four.\n'
        'FOUR = len(Path("x" * TWO).name) + TWO\n',
    )
    space: dict = {}
    exec(text, space)
    assert space["FOUR"] == 4 and "# ---- b.py\n# Second." in text and "# Four.\nFOUR" in text and "nothing" not in text


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ("import megatron_taipan.config", "", "write `from"),
        ("from .config import x", "", "relative"),
        ("from megatron_taipan.ops import ssd", "", "is not a module"),
        ("def f():\n    from megatron_taipan.b import x", "", "at the top, not inside functions"),
        ("from megatron_taipan.b import x", "x = 1", "a cannot import x of b"),
        ("x = 1", "from megatron_taipan.a import x as y", "b cannot import x of a"),
        ("x = 1", "def x(): ...", "x means .*: rename one"),
        ("from torch import nn", "import torch.nn as nn", "nn means .*: rename one"),
    ],
)
def test_what_cannot_be_joined_is_refused(house, first, second, reason):
    with pytest.raises(ImportError, match=reason):
        house(f"{first}\n", f"{second}\n")


def test_a_module_that_no_file_holds_is_refused(house, tmp_path):
    (tmp_path / "exchange.py").write_text("x = 1\n")
    with pytest.raises(ImportError, match=r"b imports exchange, which no file of an export holds \(FILES\)"):
        house("", "from megatron_taipan.exchange import x\n")
