"""The model's source files as a flat folder, so that an exported model loads where our package is not installed.

transformers copies the files that `auto_map` names, and whatever they import relatively, out of one folder. A user who
opens it should find what they would have written by hand: a dozen files with the network for inference and fine-tuning
on one process, and nothing of the trainer. So each file of an export is a few of this package's files, one after the
other as FILES says, with their imports merged at the top; every other line stays as it is.

An import that FILES does not know is an error: what an export holds grows by a decision, not by an import. The fast
kernels are not in it: they need triton, without which transformers would refuse the whole folder (hf/__init__.py hands
them to the same classes where this package is installed).

transformers before 5.10 copies only what the file of `auto_map` itself imports, not what these import in turn, and so
each of the two files ends with a list of all that it needs.
"""

import ast
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import megatron_taipan

PACKAGE = "megatron_taipan"
REQUIRED = {"torch", "transformers", "pydantic"}  # what an exported folder may import
ENTRIES = ("configuration_taipan", "modeling_taipan")  # what `auto_map` in config.json names

# The export's files and which of this package's each holds, in order: a module comes after those that it imports.
FILES: dict[str, tuple[str, ...]] = {
    "taipan_layer_kinds": (
        "errors", "param_spec", "layer_kinds.record", "layer_kinds.common", "layer_kinds.attention",
        "layer_kinds.mamba2", "layer_kinds.selective", "layer_kinds.registry",
    ),
    "taipan_config": ("section", "gate_config", "pattern", "model_config"),
    "taipan_ops": (
        "ops.numerics", "ops.tiles", "ops.product", "ops.norms", "ops.rope", "ops.swiglu", "ops.refine",
        "ops.selected_rows", "ops.causal_conv1d", "ops.ssd", "ops.interval_attention", "ops.decode",
        "ops.cross_entropy", "ops.operations",
    ),
    "taipan_parameters": (
        "parameters", "parallel.one_rank", "model.init", "model.build", "model.fused_params", "model.stream",
        "model.layers",
    ),
    "taipan_context": ("model.gate_settings", "model.cache", "model.context"),
    "taipan_mamba2": ("model.mamba2",),
    "taipan_attention": ("model.attention", "model.noise", "model.gate"),
    "taipan_stack": ("model.blocks", "model.stack"),
    "taipan_inputs": ("hf.arguments", "hf.documents", "hf.cache"),
    "taipan_network": ("hf.linears", "hf.network"),
    "configuration_taipan": ("versions", "hf.configuration_taipan"),
    "modeling_taipan": ("hf.modeling_taipan",),
}  # fmt: skip

WIDTH = 120  # of a line
SAYS = "Part of Taipan for transformers, written by an export of megatron_taipan from its files "


class Imported(NamedTuple):
    """`import module`, or `from module import name`; `as` what, where it says so."""

    module: str
    name: str | None
    renamed: str | None = None

    @property
    def bound(self) -> str:
        """The name that it gives a value."""
        return self.renamed or self.name or self.module


class ModuleSource(NamedTuple):
    """A file of this package, taken apart."""

    module: str  # below our package: "model.gate"
    doc: str  # the docstring, "" without one
    outside: list[Imported]  # of others' packages
    ours: list[Imported]  # from modules below our package
    body: str  # everything after docstring and imports, ready for an export
    defines: list[str]  # names that the body gives a value at the top level


def bundle_sources(files: dict[str, tuple[str, ...]] | None = None) -> dict[str, str]:
    """Every file of the export, by name.

    Args:
        files: as FILES, which is meant by None.

    Raises:
        ImportError: a module imports what no file holds, or in a way that cannot be joined.
    """
    files = FILES if files is None else files
    where = {module: name for name, modules in files.items() for module in modules}
    sources = {name: [read_source(module) for module in modules] for name, modules in files.items()}
    texts = {f"{name}.py": join(name, sources[name], where) for name in files}
    for entry in files.keys() & set(ENTRIES):
        texts[f"{entry}.py"] += _list_of_files(sorted(_needed_by(entry, sources, where) - {entry}))
    return dict(sorted(texts.items()))


def read_source(module: str) -> ModuleSource:
    """Takes a module of this package apart.

    Raises:
        ImportError: a form of import that cannot be joined with others.
    """
    text = _path_of(module).read_text(encoding="utf-8")
    tree, lines = ast.parse(text), text.split("\n")
    outside, ours = list[Imported](), list[Imported]()
    taken = set[int]()  # lines that do not go into the body
    for node in tree.body:
        if isinstance(node, ast.Import):
            outside += [Imported(alias.name, None, alias.asname) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                into, place = (ours, _below(node.module)) if _is_ours(node, module) else (outside, str(node.module))
                into.append(Imported(place, alias.name, alias.asname))
        elif not _is_docstring(node) and not _is_for_types(node):
            continue
        taken |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        if isinstance(node, ast.Import) and any(alias.name.split(".")[0] == PACKAGE for alias in node.names):
            raise ImportError(f"{module}:{node.lineno}: write `from {PACKAGE}.x import y`, which can be joined")
    for inner in _inside(tree):
        if isinstance(inner, ast.ImportFrom) and _is_ours(inner, module):
            raise ImportError(
                f"{module}:{inner.lineno}: what an export holds is imported at the top, not inside functions"
            )
    body = "\n".join(line for number, line in enumerate(lines, 1) if number not in taken).strip("\n")
    outside = [each for each in outside if each.bound != "TYPE_CHECKING"]  # what it guards is left out
    return ModuleSource(module, ast.get_docstring(tree) or "", outside, ours, body, list(_defined(tree.body)))


def join(name: str, sources: list[ModuleSource], where: dict[str, str]) -> str:
    """One file of the export: all imports, then the bodies, each after a comment that says where it is from.

    Raises:
        ImportError: an import of what no file holds, or of what comes later; two meanings of a name.
    """
    outside, inside, done, meanings = set[Imported](), set[Imported](), set[str](), dict[str, tuple]()
    for source in sources:
        outside |= set(source.outside)
        for each in source.ours:
            if each.module not in where:
                raise ImportError(f"{source.module} imports {each.module}, which no file of an export holds (FILES)")
            if where[each.module] != name:
                inside.add(each._replace(module=f".{where[each.module]}"))
            elif each.module not in done or each.renamed:
                raise ImportError(f"{source.module} cannot import {each.name} of {each.module} within {name}.py")
        named: dict[str, tuple] = {bound: (source.module, bound) for bound in source.defines}
        named |= {each.bound: (each.module, each.name) for each in (*source.outside, *source.ours)}
        for bound, meaning in named.items():
            if meanings.setdefault(bound, meaning) != meaning:
                raise ImportError(f"{bound} means {meanings[bound]} and {meaning} within {name}.py: rename one")
        done.add(source.module)
    files = [f"{source.module.replace('.', '/')}.py" for source in sources]
    says = textwrap.fill(f'"""{SAYS}{", ".join(files)}.', WIDTH - 3, break_on_hyphens=False)
    parts = [f'{says}"""\n\n{_imports(outside, inside)}']
    for file, source in zip(files, sources, strict=True):
        says = "\n".join(f"# {line}".rstrip() for line in source.doc.split("\n"))
        parts.append(f"# ---- {file}\n{says}\n\n{source.body}")
    return "\n\n\n".join(part for part in parts if part) + "\n"


def _imports(outside: set[Imported], inside: set[Imported]) -> str:
    """Import statements: the standard library, other packages, the export's own files."""
    standard = {each for each in outside if each.module.split(".")[0] in sys.stdlib_module_names}
    groups = (standard, outside - standard, inside)
    return "\n\n".join(_statements(group) for group in groups if group)


def _statements(imports: set[Imported]) -> str:
    """One statement for each module."""
    lines = sorted(f"import {each.module}{_renamed(each)}" for each in imports if each.name is None)
    for module in sorted({each.module for each in imports if each.name is not None}):
        names = sorted(f"{each.name}{_renamed(each)}" for each in imports if each.module == module and each.name)
        line = f"from {module} import {', '.join(names)}"
        if len(line) > WIDTH:
            line = "\n".join([f"from {module} import (", *(f"    {name}," for name in names), ")"])
        lines.append(line)
    return "\n".join(lines)


def _renamed(each: Imported) -> str:
    return f" as {each.renamed}" if each.renamed else ""


def _needed_by(entry: str, sources: dict[str, list[ModuleSource]], where: dict[str, str]) -> set[str]:
    """The entry and every file that it imports, directly or not."""
    needed, waiting = set[str](), [entry]
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += [where[each.module] for source in sources[name] for each in source.ours]
    return needed


def _list_of_files(names: list[str]) -> str:
    """Lines that import the files without ever running: transformers reads them as text."""
    lines = [f"    from .{name} import __doc__\n" for name in names]
    return "".join(["\n\nif False:  # what transformers before 5.10 must copy beside this file\n", *lines]) * bool(
        lines
    )


def _is_ours(node: ast.ImportFrom, module: str) -> bool:
    if node.level:
        raise ImportError(f"{module}:{node.lineno}: relative imports cannot be joined")
    if not node.module or node.module.split(".")[0] != PACKAGE:
        return False
    if not _path_of(_below(node.module)).is_file():
        raise ImportError(f"{module}:{node.lineno}: {node.module} is not a module; import from its files")
    return True


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.lineno == 1


def _is_for_types(node: ast.stmt) -> bool:
    """Whether it is `if TYPE_CHECKING:`, which never runs; annotations that need it are strings."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _inside(tree: ast.Module) -> Iterator[ast.AST]:
    """Every node below the top level that may run."""
    for node in tree.body:
        if not isinstance(node, ast.Import | ast.ImportFrom) and not _is_for_types(node):
            yield from ast.walk(node)


def _defined(body: list[ast.stmt]) -> Iterator[str]:
    """Names that the statements give a value at the top level."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name))


def _below(module: str | None) -> str:
    """`megatron_taipan.a.b` -> `a.b`."""
    return str(module).removeprefix(f"{PACKAGE}.")


def _path_of(module: str) -> Path:
    """The file of a module below our package (`a.b` -> `megatron_taipan/a/b.py`)."""
    return Path(megatron_taipan.__file__).parent.joinpath(*module.split(".")).with_suffix(".py")
