"""Runs the smallest study as its program does, but each command in a fork of one process that has imported what they
need: 16 interpreters that import torch and DeepSpeed would take a minute.

    python -m tests.forked_study        in a checkout, or a folder of links to one
"""

import importlib.util
import os
import sys
import traceback
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import torch

from megatron_taipan.evaluation import figures
from megatron_taipan.evaluation.__main__ import TASKS

FILE = Path(__file__).resolve().parents[1] / "examples/study/study.py"
PROGRAMS = {"launch/pretrain.py": "megatron_taipan.pretrain", "data_prep": "data_prep.cli"}
IMPORTED = (
    "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer", "torch._dynamo", "torch._inductor.compile_fx",
    "megatron_taipan.train.loop",
    *(f"megatron_taipan.evaluation.{task.replace('-', '_')}" for task in TASKS), *PROGRAMS.values(),
)  # fmt: skip


def load_study() -> ModuleType:
    """The study's program as a module."""
    spec = importlib.util.spec_from_file_location("study", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_fork(command: list[str], log: Path) -> int:
    """Runs a command of the study by its `main`, in a process of its own; gives its exit status."""
    program, *arguments = command[2:] if command[1] == "-m" else command[1:]
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        printed = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        status = import_module(PROGRAMS.get(program, f"{program}.__main__")).main(arguments) or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in IMPORTED:
        import_module(name)
    with TemporaryDirectory() as folder:  # matplotlib's fonts and its grammar of powers are made with the first picture
        one = [figures.Curve("a", [1, 4], [1, 4])]
        figures.write_curves(Path(folder) / "a.svg", one, x="", y="", log_x=True, log_y=True)
    study = load_study()
    study.study(study.TINY, run_fork, jobs=1)
