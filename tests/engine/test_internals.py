"""What the engine room takes from DeepSpeed's and torch's insides: the list is complete, the installed ones have it."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch

from megatron_taipan.engine import internals
from megatron_taipan.engine.internals import READ, REPLACED, TRIED
from megatron_taipan.engine.startup import import_deepspeed
from megatron_taipan.versions import TORCH_NEWEST, TORCH_OLDEST

ROOM = Path(internals.__file__).parent
PACKAGE = ROOM.parent
HOLDERS = ("engine", "optimizer", "zero", "mapping")  # what DeepSpeed's objects are called in the room
# what DeepSpeed and torch document, and what is ours
DOCUMENTED = {
    "module", "optimizer", "state", "train_batch", "eval_batch", "train_micro_batch_size_per_gpu", "DeepSpeedEngine",
    "zero_optimization_stage", "is_gradient_accumulation_boundary", "name", "get_gradient_for_reduction",
    "is_last_stage", "get_global_grad_norm",
}  # fmt: skip
LISTED = {name for internal in (*REPLACED, *READ) for name in internal.names.split()}


def taken(path: Path) -> set[str]:
    """Attributes of objects that are called as DeepSpeed's, and self.optimizer's and self.zero's."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            owner = node.value
            name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
            if name in HOLDERS:
                found.add(node.attr)
    return found


def test_the_list_holds_all_that_the_room_takes():
    found = set().union(*(taken(path) for path in ROOM.glob("*.py") if path.name != "internals.py"))
    missing = found - LISTED - DOCUMENTED
    # of torch's AdamW, which some of the room's objects are called after as well
    missing -= {"defaults", "grad_scale", "found_inf", "param_groups", "cur_scale"}
    assert not missing, f"add these to engine/internals.py with the reason: {sorted(missing)}"


def test_nobody_else_reaches_inside():
    """Private names of objects that are not ours, outside of the room."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        if path.is_relative_to(ROOM):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in HOLDERS:
                if node.attr in LISTED - DOCUMENTED - {"device", "dtype", "step"}:
                    found.append(f"{path.relative_to(PACKAGE)}:{node.lineno} {node.value.id}.{node.attr}")
    assert not found, "take it through the engine room: " + ", ".join(found)


@pytest.mark.parametrize("internal", [*REPLACED, *READ], ids=lambda internal: internal.names.split()[0])
def test_what_is_installed_has_it(internal):
    deepspeed = import_deepspeed(torch.device("cpu"))
    module_name, name = internal.owner.split(":")
    module = importlib.import_module(module_name)
    owner = getattr(module, name, None) if name else module
    version = f"DeepSpeed {deepspeed.__version__} (tried: {TRIED})"
    if module_name.startswith("torch"):
        version = f"torch {torch.__version__} (tried: {TORCH_OLDEST} to {TORCH_NEWEST})"
    assert owner is not None, f"{version} has no {internal.owner}, of which {internal.names} are used: {internal.why}"
    classes = [c for c in owner.__mro__ if c.__module__.startswith("deepspeed")] if name else [module]
    source = "".join(map(inspect.getsource, classes))
    for attribute in internal.names.split():
        known = hasattr(owner, attribute) or any(
            text in source for text in (f"self.{attribute}", f"{attribute}:", "" if name else f".{attribute}") if text
        )
        assert known, f"{version}: {internal.owner} has no {attribute} any more: {internal.why}"


def test_an_attribute_that_is_gone_is_named():
    for owner, package in ((internals.ZERO_12, "DeepSpeed"), ("torch.distributed.distributed_c10d:", "torch")):
        gone = internals.Internal(owner, "no_such_thing", "because")
        with pytest.raises(AssertionError, match=rf"{package} .* has no no_such_thing any more: because"):
            test_what_is_installed_has_it(gone)
