"""The one entry to the evaluation tasks."""

import importlib.util
import subprocess
import sys

import pytest

from megatron_taipan.evaluation.__main__ import TASKS, main


def test_without_a_task_they_are_listed(capsys):
    assert main([]) == 0
    said = capsys.readouterr().out
    assert all(f"\n    {task} " in said for task in TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_every_task_is_a_module_that_says_what_it_takes(task, capsys):
    assert importlib.util.find_spec(f"megatron_taipan.evaluation.{task.replace('-', '_')}")
    with pytest.raises(SystemExit) as left:
        main([task, "--help"])
    assert left.value.code == 0 and "usage:" in capsys.readouterr().out


def test_an_unknown_task_is_refused_with_the_known_ones(capsys):
    assert main(["perplexty", "model"]) == 2
    assert "perplexity, passkey" in capsys.readouterr().err


def test_runs_as_a_program(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "megatron_taipan.evaluation", "perplexity", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: ") and str(tmp_path) in done.stderr
