"""The pages that name files and functions name existing ones, and the picture of the rooms shows imports there are."""

import ast
import re
from pathlib import Path

import pytest

from tests.test_layering import OURS, imports, room_of, sources

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = ROOT / "docs" / "architecture.md"
PAGES = [ARCHITECTURE, *sorted((ROOT / "examples").rglob("README.md"))]
# a file, and behind a colon a function, a class or one of its members
NAMED = re.compile(r"(?<![\w/.-])((?:[\w.]+/)*\w+\.(?:py|sbatch|yaml|sh))(?::([A-Za-z_]\w*(?:\.\w+)*))?")
BRANCHES = (ast.If, ast.Try, ast.With)


def members(body: list[ast.stmt]) -> dict[str, list[ast.stmt]]:
    """What these statements define, by name, each with the statements inside."""
    found: dict[str, list[ast.stmt]] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node.body
        elif isinstance(node, ast.Assign):
            found |= {target.id: [] for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = []
        elif isinstance(node, BRANCHES):
            found |= members(node.body)
    return found


def faults(text: str, beside: Path = ROOT) -> list[str]:
    """Files and names in the text that are not there; a path is below the root, megatron_taipan or `beside`."""
    found = []
    for path, name in NAMED.findall(text):
        file = next((base / path for base in (ROOT, ROOT / "megatron_taipan", beside) if (base / path).is_file()), None)
        if file is None:
            found.append(path)
        elif name:
            inside = ast.parse(file.read_text(encoding="utf-8")).body
            for part in name.split("."):
                inside = members(inside).get(part)  # type: ignore[assignment]
                if inside is None:
                    found.append(f"{path}:{name}")
                    break
    return found


def rooms_and_arrows(text: str) -> tuple[set[str], list[tuple[str, str]]]:
    """Boxes and arrows of the page's first picture."""
    picture = re.search(r"```mermaid\n(.*?)```", text, re.S)[1]
    return set(re.findall(r"^ +(\w+)\[", picture, re.M)), re.findall(r"^ +(\w+) --> (\w+)$", picture, re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_is_there(page):
    text = re.sub(r"runs/\S+", "", page.read_text(encoding="utf-8"))  # what the commands make
    assert not faults(text, page.parent)


def test_the_page_names_a_function_in_most_steps():
    named = NAMED.findall(ARCHITECTURE.read_text(encoding="utf-8"))
    assert sum(bool(name) for _, name in named) > 80


@pytest.mark.parametrize("name", ["train/loops.py", "train/loop.py:trains", "data/blend.py:Blend.all", "model/x.py:y"])
def test_what_is_not_there_is_found(name):
    assert faults(f"it is in `train/loop.py:train` and in `{name}`.") == [name.removesuffix(":y")]


def test_the_picture_of_the_rooms_shows_imports_that_there_are_and_every_room():
    rooms, arrows = rooms_and_arrows(ARCHITECTURE.read_text(encoding="utf-8"))
    assert len(arrows) > 12 and {room for arrow in arrows for room in arrow} == rooms
    modules = [(".".join(file.relative_to(ROOT).with_suffix("").parts), file) for file in sources()]
    real = {
        (room_of(module).removeprefix("megatron_taipan."), room_of(name).removeprefix("megatron_taipan."))
        for module, file in modules
        for _, name in imports(ast.parse(file.read_text(encoding="utf-8")))
    }
    assert not set(arrows) - real
    folders = {path.parent.name for path in (ROOT / "megatron_taipan").glob("*/__init__.py")}
    assert folders | {*OURS} - {"megatron_taipan"} <= rooms


def test_the_page_has_every_exit_status_of_a_run():
    listed = {int(status) for status in re.findall(r"^\| (\d+) \|", ARCHITECTURE.read_text(encoding="utf-8"), re.M)}
    program = ast.get_docstring(ast.parse((ROOT / "megatron_taipan/pretrain.py").read_text(encoding="utf-8")))
    told = re.search(r"Exit status: (.*)", program, re.S)[1]
    assert listed == {1} | {int(status) for status in re.findall(r"(?<![\w.])\d+(?= )", told)}
