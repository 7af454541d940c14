"""Imports run downward only: each room imports what CONTRIBUTING.md's table allows, and nothing else.

Read from the source with ast, so that imports inside functions count too.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("megatron_taipan", "data_prep", "checkpoints", "launch", "benchmarks", "experiments")
BASICS = {
    "megatron_taipan",
    "megatron_taipan.errors",
    "megatron_taipan.programs",
    "megatron_taipan.untrusted",
}  # allowed everywhere

# what layers are, the description of a network of them, and the table of their parameters
KINDS = ("layer_kinds", "param_spec", "model_config", "parameters")

# the sections of the configuration that stand on their own
SECTIONS = (
    "parallel_config",
    "data_config",
    "optim_config",
    "train_config",
    "checkpoint_config",
    "task_config",
    "log_config",
    "ops_config",
)

TRAINING = {
    *KINDS,
    *SECTIONS,
    "engine",
    "config",
    "stages",
    "gate_config",
    "pattern",
    "ops",
    "parallel",
    "model",
    "data",
    "checkpoint",
}
PROGRAMS = {*TRAINING, "config_loading", "config_text", "tokenizer", "inference", "evaluation", "train"}

# room -> rooms it may import; a room may always import itself
ROOMS: dict[str, set[str]] = {
    "megatron_taipan.errors": set(),
    "megatron_taipan.programs": set(),
    "megatron_taipan.untrusted": set(),
    "megatron_taipan.plain_yaml": set(),
    "megatron_taipan.param_spec": set(),
    "megatron_taipan.layer_kinds": {"param_spec"},
    "megatron_taipan.pattern": {"layer_kinds"},
    "megatron_taipan.section": set(),
    "megatron_taipan.gate_config": {"section"},
    "megatron_taipan.versions": set(),
    "megatron_taipan.model_config": {"pattern", "section", "gate_config", "layer_kinds"},
    **{f"megatron_taipan.{name}": {"section"} for name in SECTIONS},
    "megatron_taipan.lengths": set(),
    "megatron_taipan.stage_config": {"section", "gate_config"},
    "megatron_taipan.stages": {"section", "stage_config"},
    "megatron_taipan.config": {"section", "model_config", *SECTIONS, "lengths", "stage_config", "stages"},
    "megatron_taipan.config_text": {"config", "section"},
    "megatron_taipan.config_errors": {"config", "config_text", "data_config", "gate_config", "section"},
    "megatron_taipan.config_overrides": {"config", "config_errors", "plain_yaml"},
    "megatron_taipan.config_loading": {"config", "config_errors", "config_overrides", "plain_yaml"},
    "megatron_taipan.ops": set(),
    "megatron_taipan.parameters": {"model_config", "layer_kinds", "param_spec"},
    "megatron_taipan.parallel": {"config", "parallel_config", "ops", *KINDS},
    "megatron_taipan.model": {"gate_config", "ops", "parallel", *KINDS},
    "megatron_taipan.engine": {"config", "stages", "gate_config", "optim_config", "ops", "parallel", "model", *KINDS},
    "megatron_taipan.tokenizer": set(),
    "megatron_taipan.data": {"data_config"},
    "megatron_taipan.checkpoint": {
        "config",
        "config_loading",
        "config_text",
        "stages",
        "section",
        "pattern",
        "parallel",
        "data",
        *KINDS,
        "engine",
    },
    "megatron_taipan.inference": {
        "config",
        "data_config",
        "model_config",
        "ops",
        "model",
        "data",
        "tokenizer",
        "checkpoint",
        "parallel",
    },
    "megatron_taipan.evaluation": {
        "config",
        "config_loading",
        "data_config",
        "ops",
        "model",
        "data",
        "tokenizer",
        "checkpoint",
        "parallel",
        "inference",
        *KINDS,
    },
    "megatron_taipan.train": {*TRAINING, "versions"},
    "megatron_taipan.hf": {"gate_config", "versions", "ops", "parallel", "model", *KINDS},
    "data_prep": {"data", "tokenizer", "plain_yaml"},
    "checkpoints": {
        "config",
        "config_loading",
        "config_text",
        "data_config",
        "pattern",
        "versions",
        "model",
        "parallel",
        "checkpoint",
        "data",
        "tokenizer",
        "inference",
        "hf",
        *KINDS,
        "engine",
    },
    "megatron_taipan.pretrain": {"config_loading", "config_text", "engine", "parallel", "train"},
    "launch": {"pretrain", "config_loading", "checkpoint"},
    "benchmarks": PROGRAMS,
    "experiments": PROGRAMS,
}

# Libraries that belong to a few rooms: the model must run where they are not installed, or not wanted.
LIBRARIES: dict[str, set[str]] = {
    "deepspeed": {
        "megatron_taipan.engine",
        "benchmarks",
        "experiments",
    },
    "transformers": {
        "megatron_taipan.hf",
        "megatron_taipan.inference",
        "megatron_taipan.evaluation",
        "checkpoints",
        "launch",
        "benchmarks",
        "experiments",
    },
    "matplotlib": {"megatron_taipan.evaluation", "experiments"},
    "triton": {"megatron_taipan.ops", "benchmarks", "experiments"},
    "apex": {"megatron_taipan.engine"},
    "amp_C": {"megatron_taipan.engine"},
    "mamba_ssm": {"megatron_taipan.ops", "benchmarks", "experiments"},
    "causal_conv1d": {"megatron_taipan.ops", "benchmarks", "experiments"},
    "flash_attn": {"megatron_taipan.ops", "benchmarks", "experiments"},
}


def sources() -> list[Path]:
    return sorted(path for room in OURS for path in (ROOT / room).rglob("*.py"))


def is_for_types(node: ast.AST) -> bool:
    """Whether it is `if TYPE_CHECKING:`, which never runs."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, full module or name) of every import, wherever it stands, but for those that only types need."""
    typing_only = {id(inner) for node in ast.walk(tree) if is_for_types(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the full name"
            yield node.lineno, node.module or ""


def room_of(module: str) -> str:
    """The room that a module of ours belongs to."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "megatron_taipan" else parts[0]


def faults(module: str, text: str) -> list[str]:
    """What `text`, the source of `module`, imports against the tables."""
    room, found = room_of(module), []
    allowed = {f"megatron_taipan.{name}" for name in ROOMS.get(room, set())} | BASICS | {room}
    # the benchmark times it from inside; an export translates the tokenizer as the data's fast way does
    allowed |= {"data_prep"} if room in ("benchmarks", "experiments", "checkpoints") else set()
    allowed |= {"benchmarks"} if room == "experiments" else set()
    for line, name in imports(ast.parse(text)):
        top = name.split(".")[0]
        if top in OURS and room_of(name) not in allowed:
            found.append(f"{module}:{line} imports {name}: {room} may import {sorted(allowed)}")
        if top in LIBRARIES and room not in LIBRARIES[top]:
            found.append(f"{module}:{line} imports {top}, which belongs to {sorted(LIBRARIES[top])}")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_downward(path: Path) -> None:
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    assert room_of(module) in {*ROOMS, "megatron_taipan"}, f"{path} stands in no room of the table"
    found = faults(module, path.read_text(encoding="utf-8"))
    assert not found, "\n" + "\n".join(found)


def test_rooms_have_no_cycle() -> None:
    """The table itself runs downward: sorting it topologically succeeds."""
    left = {room: {f"megatron_taipan.{name}" for name in allowed} for room, allowed in ROOMS.items()}
    while left:
        free = [room for room, needs in left.items() if not needs & left.keys()]
        assert free, f"these rooms may import each other in a circle: {sorted(left)}"
        for room in free:
            del left[room]


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("megatron_taipan.model.taipan", "import deepspeed"),
        ("megatron_taipan.model.taipan", "def f():\n    from megatron_taipan.train.loop import train"),
        ("megatron_taipan.config", "from megatron_taipan.model.taipan import Taipan"),
        ("megatron_taipan.ops.ssd", "from megatron_taipan.config import Config"),
        ("data_prep.cli", "from megatron_taipan.train.loop import train"),
        ("megatron_taipan.train.loop", "from megatron_taipan.pretrain import main"),
    ],
)
def test_an_upward_import_is_found(module: str, text: str) -> None:
    assert len(faults(module, text)) == 1
