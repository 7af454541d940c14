"""Outside of the engine room nobody names what is private to another package, but where a list says why.

Private is a name with one leading underscore that neither the file itself nor one of ours that it imports defines: as
an attribute, in an import, or as a string given to getattr and its like. A release of the other package may move such a
name without a word, so each stands here or in engine/internals.py, and the installed packages are asked for it.
"""

import ast
import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from megatron_taipan.engine.internals import READ, REPLACED

ROOT = Path(__file__).resolve().parents[1]
OURS = ("megatron_taipan", "data_prep", "checkpoints", "launch", "benchmarks", "experiments", "examples")
ENGINE = "megatron_taipan/engine/"
LANGUAGE = {"_exit", "_asdict", "_replace", "_fields"}  # Python documents them; os and namedtuple
BY_NAME = ("getattr", "setattr", "hasattr", "delattr")


class Exempt(NamedTuple):
    """Private names that a file may use."""

    file: str
    names: str  # separated by blanks
    owner: str  # module:class that has them, or module: ("": nothing is lost where nobody has them)
    why: str


EXEMPT = (
    Exempt("megatron_taipan/ops/copies.py", "_foreach_copy_", "torch:", "many copies in one launch; no public way"),
    Exempt(
        "megatron_taipan/ops/product.py", "_forward_hooks _forward_pre_hooks", "torch.nn.modules.module:Module",
        "a module with hooks is called, one without is only its matrix; no public way to ask; exports need it",
    ),
    Exempt(
        "megatron_taipan/model/recompute.py", "torch.utils._python_dispatch", "torch.utils._python_dispatch:",
        "TorchDispatchMode: torch's notes on extending it name this module and no other",
    ),
    Exempt(
        "megatron_taipan/model/recompute.py", "_version", "torch:Tensor",
        "whether a kept product was changed in place; torch's own checkpointing asks so too",
    ),
    Exempt("megatron_taipan/parallel/recompute_cache.py", "_version", "torch:Tensor", "as in model/recompute.py"),
    Exempt(
        "megatron_taipan/parallel/recompute_cache.py", "torch.utils._python_dispatch _disable_current_modes",
        "torch.utils._python_dispatch:", "a product in chunks is kept as one; the mode would see each of its operators",
    ),
    Exempt(
        "megatron_taipan/parallel/peer_memory.py", "torch.distributed._symmetric_memory",
        "torch.distributed._symmetric_memory:", "torch has no public name for memory that GPUs share",
    ),
    Exempt(
        "megatron_taipan/train/profiling.py", "_record_memory_history _dump_snapshot", "torch.cuda.memory:",
        "torch's page on GPU memory documents both by these names",
    ),
    Exempt(
        "megatron_taipan/hf/modeling_taipan.py", "_is_user_defined", "",
        "transformers marks so a cache that was passed in, in the method that ours replaces; it is set, never read",
    ),
    Exempt(
        "megatron_taipan/hf/network.py", "_is_hf_initialized", "transformers.modeling_utils:PreTrainedModel",
        "transformers marks so what a file held; its public initialisers ask too, after the value was computed",
    ),
    Exempt(
        "checkpoints/reload_folder.py", "_keep_in_fp32_modules_strict", "transformers.modeling_utils:PreTrainedModel",
        "what our exported class tells transformers, by transformers' name; the program may import nothing of ours",
    ),
    Exempt(
        "megatron_taipan/tokenizer/tiktoken_file.py", "_mergeable_ranks", "tiktoken.core:Encoding",
        "of all tokens and ranks is the digest by which data is told apart; tiktoken's page shows them by this name",
    ),
    Exempt("benchmarks/common.py", "_sleep", "torch.cuda:", "keeps the GPU busy while launches are queued"),
    Exempt("benchmarks/autotune.py", "_bench", "triton.runtime.autotuner:Autotuner", "shares candidates out"),
)  # fmt: skip


def sources() -> dict[str, ast.Module]:
    """Our files by their paths below the root."""
    paths = sorted(path for room in OURS for path in (ROOT / room).rglob("*.py"))
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_" and name not in LANGUAGE


def defined(tree: ast.Module) -> Iterator[str]:
    """Names that a file gives to something itself: functions, classes, variables, and attributes of self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.attr


def private_names(tree: ast.Module, ours: set[str]) -> Iterator[tuple[int, str]]:
    """(line, name) wherever a file names what is private and not ours; for a private module its full name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if any(map(is_private, alias.name.split(".")))]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] not in OURS:
            names = [alias.name for alias in node.names]
            names += [node.module] if node.module and any(map(is_private, node.module.split("."))) else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BY_NAME:
            names = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        else:
            continue
        yield from ((node.lineno, n) for n in names if n not in ours and any(map(is_private, n.split("."))))


def found(trees: dict[str, ast.Module]) -> list[tuple[str, int, str]]:
    """(file, line, name) of all private names that are not ours."""
    own = {file: set(defined(tree)) for file, tree in trees.items()}
    result = []
    for file, tree in trees.items():
        ours = own[file].union(*(own.get(other, set()) for other in imported(tree)))
        result += [(file, line, name) for line, name in private_names(tree, ours)]
    return result


def imported(tree: ast.Module) -> set[str]:
    """The files of ours that a file imports."""
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return {f"{module.replace('.', '/')}.py" for module in modules}


@pytest.fixture(scope="module")
def hits() -> list[tuple[str, int, str]]:
    return found(sources())


def faults(hits: list[tuple[str, int, str]]) -> list[str]:
    """What stands neither in the list nor in the engine room."""
    allowed = {(exempt.file, name) for exempt in EXEMPT for name in exempt.names.split()}
    outside = [hit for hit in hits if not hit[0].startswith(ENGINE)]
    return [f"{file}:{line} names {name}" for file, line, name in outside if (file, name) not in allowed]


def test_no_private_name_of_another_package_outside_the_engine_room(hits):
    wrong = faults(hits)
    assert not wrong, "take it through the engine room, or say in EXEMPT why not:\n" + "\n".join(wrong)


def test_every_exemption_is_needed(hits):
    used = {(file, name) for file, _, name in hits}
    spare = [f"{e.file}: {name}" for e in EXEMPT for name in e.names.split() if (e.file, name) not in used]
    assert not spare, "no longer used: " + ", ".join(spare)


def test_those_of_the_engine_room_stand_in_its_list(hits):
    listed = {name for internal in (*REPLACED, *READ) for name in internal.names.split()}
    inside = [hit for hit in hits if hit[0].startswith(ENGINE)]
    missing = [f"{file}:{line} names {name}" for file, line, name in inside if name not in listed]
    assert not missing, "add to engine/internals.py, with the reason:\n" + "\n".join(missing)


@pytest.mark.parametrize(
    "exempt", [e for e in EXEMPT if e.owner], ids=lambda exempt: f"{exempt.file}:{exempt.names.split()[0]}"
)
def test_the_installed_packages_have_what_is_exempt(exempt):
    package = exempt.owner.split(".")[0].split(":")[0]
    pytest.importorskip(package)
    for name in exempt.names.split():
        assert has(exempt.owner, name), gone(exempt.owner, name, exempt.why)


def has(owner: str, name: str) -> bool:
    """Whether a `module:class`, or a `module:`, has an attribute, or the module's source names it."""
    module, _, class_name = owner.partition(":")
    spec = importlib.util.find_spec(module)
    if spec is None or name == module:
        return spec is not None
    if spec.origin and spec.origin.endswith(".py") and re.search(rf"\b{name}\b", Path(spec.origin).read_text()):
        return True
    holder = importlib.import_module(module)
    return hasattr(getattr(holder, class_name, None) if class_name else holder, name)


def gone(owner: str, name: str, why: str) -> str:
    package = owner.split(".")[0].split(":")[0]
    return f"{package} {importlib.metadata.version(package)}: {owner} has no {name} any more: {why}"


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch._foreach_norm([])",
        "def f(x):\n    return x.state._private_of_another",
        "from torch.utils import _pytree",
        "from torch._dynamo import config",
        "import torch._inductor.config as config",
        "def f(x):\n    return getattr(x, '_hidden', None)",
        "def f(x):\n    x._hidden_too = 1",
        "def f(x):\n    return x._mine  # another file's, which this one does not import",
    ],
)
def test_a_private_name_is_found(text):
    other = {"megatron_taipan/train/step.py": ast.parse("class A:\n    def _mine(self):\n        pass")}
    assert len(faults(found({**other, "megatron_taipan/train/loop.py": ast.parse(text)}))) == 1
    assert not faults(found({"megatron_taipan/engine/build.py": ast.parse(text)}))
    importing = ast.parse("from megatron_taipan.train.step import A\n" + text)
    assert len(faults(found({**other, "megatron_taipan/train/loop.py": importing}))) == ("_mine" not in text)


def test_what_is_ours_or_the_languages_is_not():
    tree = ast.parse("""
class A:
    def __init__(self):
        self._mine = 1

    def take(self, other, place):
        place._replace(x=1)
        os._exit(0)
        return other._mine, place.__dict__
""")
    assert not faults(found({"megatron_taipan/train/loop.py": tree}))


def test_a_name_that_moved_is_told_in_words():
    assert not has("torch:Tensor", "_no_such_thing") and not has("torch.nn:Module", "_no_such_thing")
    assert "has no _no_such_thing any more: because" in gone("torch:Tensor", "_no_such_thing", "because")
