"""Every command that the documentation and the programs' own texts print names a module or file that exists."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("megatron_taipan", "data_prep", "checkpoints", "launch", "benchmarks", "experiments", "tests")
NAME = rf"(?:{'|'.join(OURS)})"
MODULE = re.compile(rf"-m ({NAME}(?:\.\w+)*)(?![\w.]*{{)(?: (\w+))?")  # what code completes is no name
PROGRAM = r"(?:python|deepspeed|torchrun|bash|sbatch)(?: -{1,2}\S+(?: \d\S*)?)*"  # with its own options
SCRIPT = re.compile(rf"{PROGRAM} ({NAME}/[\w/.]+\.\w+)")


def texts() -> list[Path]:
    """Pages, scripts and sources; the changelog and the lab notes tell of what was."""
    kinds = ("*.md", "*.py", "*.sh", "*.sbatch", "*.yaml", "Makefile")
    found = [path for kind in kinds for path in ROOT.rglob(kind)]
    history = {ROOT / "CHANGELOG.md", ROOT / "docs/lab-notes.md"}
    rooms = (*OURS, "docs", "examples")
    return sorted(p for p in found if p not in history and (p.parent == ROOT or p.relative_to(ROOT).parts[0] in rooms))


def commands() -> list[tuple[str, str]]:
    """(module or file, first word behind it) of every command, and where one of them stands."""
    found: dict[tuple[str, str], None] = {}
    for path in texts():
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        found |= dict.fromkeys((module, word or "") for module, word in MODULE.findall(text))
        found |= dict.fromkeys((script, "") for script in SCRIPT.findall(text))
    return sorted(found)


def test_commands_are_found():
    assert {("benchmarks", "step"), ("launch/pretrain.py", ""), ("data_prep", "tokenize")} <= set(commands())


@pytest.mark.parametrize(("program", "word"), commands())
def test_what_a_command_names_exists(program: str, word: str) -> None:
    if "/" in program:
        assert (ROOT / program).is_file()
        return
    spec = importlib.util.find_spec(program)
    assert spec is not None, f"no module {program}"
    if program == "benchmarks" and word:
        from benchmarks.__main__ import BENCHMARKS

        assert word in BENCHMARKS
    if spec.submodule_search_locations:
        assert importlib.util.find_spec(f"{program}.__main__"), f"{program} is a package without __main__"


def test_no_module_beside_a_program_hides_one_of_pythons():
    """Run by its path, a program finds the modules beside it before Python's own."""
    sources = {path: path.read_text(encoding="utf-8") for room in OURS for path in (ROOT / room).rglob("*.py")}
    folders = {path.parent for path, source in sources.items() if 'if __name__ == "__main__":' in source}
    assert ROOT / "checkpoints" in folders and len(folders) > 5
    hiding = [path for path in sources if path.parent in folders and path.stem in sys.stdlib_module_names]
    assert not hiding


@pytest.mark.parametrize("room", ["launch", "checkpoints", "data_prep", "megatron_taipan"])
def test_no_program_hides_the_packages_of_pythonpath_from_another(room):
    """Nor those of ~/.local: clusters and `pip install --user` have them nowhere else."""
    isolated = re.compile(r"""python[\d.]* +-\w*[IEs]\b|["']-[IEs]["']|PYTHONPATH=(""|''|\s)""")
    programs = [path for path in (ROOT / room).rglob("*") if path.suffix in (".py", ".sh", ".sbatch")]
    lines = [(path.name, line) for path in programs for line in path.read_text(encoding="utf-8").splitlines()]
    assert not [each for each in lines if isolated.search(re.split(r"(?:^|\s)#", each[1])[0])]


def test_a_conversion_program_runs_by_its_path_from_anywhere(tmp_path):
    command = [sys.executable, str(ROOT / "checkpoints/reshard.py"), "--help"]
    assert "usage:" in subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
