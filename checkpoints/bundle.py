"""The model's source files as a flat folder, so that an exported model loads where our package is not installed.

transformers copies the files that `auto_map` names, and whatever they import relatively, out of one folder. So each
`from megatron_taipan.a.b import x` becomes `from .taipan_a_b import x`; nothing else in the files changes, but that
kernels which need further packages (triton) stay behind: importing one raises ImportError, and `ops/dispatch.py` then
takes the plain torch reference. transformers would refuse the whole folder where such a package is missing.

transformers before 5.10 copies only what the file of `auto_map` itself imports, not what these import in turn, and so
each of the two files ends with a list of all that it needs.
"""

import ast
import sys
from functools import cache
from pathlib import Path

import megatron_taipan

PACKAGE = "megatron_taipan"
REQUIRED = {"torch", "transformers", "pydantic", "yaml", "numpy"}  # what an exported folder may import
ENTRIES = ("megatron_taipan.hf.configuration_taipan", "megatron_taipan.hf.modeling_taipan")


def bundle_sources(entries: tuple[str, ...] = ENTRIES) -> dict[str, str]:
    """Every module that the entries need, by flat file name; found from the imports, nested ones included.

    Raises:
        ImportError: a module uses a form of import that cannot be made flat.
    """
    sources: dict[str, str] = {}
    for entry in entries:
        needed = _needed_by(entry)
        own = f"{flat_name(entry)}.py"
        sources |= {name: text for name, text in needed.items() if name not in sources}
        sources[own] += _list_of_files(sorted(needed.keys() - {own}))
    return dict(sorted(sources.items()))


def _needed_by(entry: str) -> dict[str, str]:
    """The entry and all that it imports, directly or not, by flat file name."""
    sources: dict[str, str] = {}
    waiting = [entry]
    while waiting:
        module = waiting.pop()
        if f"{flat_name(module)}.py" in sources:
            continue
        text = _path_of(module).read_text(encoding="utf-8")
        needed = _our_imports(module, text)
        sources[f"{flat_name(module)}.py"] = _rewrite(text, needed)
        waiting += [name for name, _ in needed if not _needs_more(name)]
    return sources


def _list_of_files(names: list[str]) -> str:
    """Lines that import the files without ever running: transformers reads them as text."""
    lines = [f"    from .{name.removesuffix('.py')} import __doc__\n" for name in names]
    return (
        "".join(["\n\nif False:  # what transformers before 5.10 must copy beside this file\n", *lines])
        if lines
        else ""
    )


def flat_name(module: str) -> str:
    """The module's name in the flat folder; the entry points keep their own, which transformers users expect."""
    if module in ENTRIES:
        return module.rpartition(".")[2]
    return "taipan_" + module.removeprefix(f"{PACKAGE}.").replace(".", "_")


def _our_imports(module: str, text: str) -> list[tuple[str, ast.ImportFrom]]:
    """(module, import) of every import of our own, nested ones included."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == PACKAGE for alias in node.names):
            raise ImportError(f"{module}:{node.lineno}: write `from {PACKAGE}.x import y`, which can be bundled")
        if isinstance(node, ast.ImportFrom):
            if node.level:
                raise ImportError(f"{module}:{node.lineno}: relative imports cannot be bundled")
            if node.module and node.module.split(".")[0] == PACKAGE:
                if not _path_of(node.module).is_file():
                    raise ImportError(f"{module}:{node.lineno}: {node.module} is no module; import from its files")
                found.append((node.module, node))
    return found


def _rewrite(text: str, imports: list[tuple[str, ast.ImportFrom]]) -> str:
    lines = text.split("\n")
    for module, node in imports:
        first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
        if _needs_more(module):
            indent = " " * node.col_offset
            lines[first] = f'{indent}raise ImportError("kernels are not part of an export: install megatron_taipan")'
            lines[first + 1 : last + 1] = [""] * (last - first)
        else:
            old, new = f"from {module} import", f"from .{flat_name(module)} import"
            lines[first] = lines[first].replace(old, new, 1)
    return "\n".join(lines)


def _needs_more(module: str) -> bool:
    """Whether a module, or one that it imports, cannot do without a package beyond REQUIRED."""
    return _file_needs_more(_path_of(module))


@cache  # modules import one another along many paths, and each would be parsed again for each
def _file_needs_more(path: Path) -> bool:
    foreign = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:  # top level: inside try or a function is a way out
        if isinstance(node, ast.Import):
            foreign |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            top = node.module.split(".")[0]
            if top == PACKAGE and _needs_more(node.module):
                return True
            foreign.add(top)
    return bool(foreign - REQUIRED - {PACKAGE} - set(sys.stdlib_module_names))


def _path_of(module: str) -> Path:
    """The file of a module of our package (`megatron_taipan/a/b.py`)."""
    root = Path(megatron_taipan.__file__).parent
    return root.joinpath(*module.split(".")[1:]).with_suffix(".py")
