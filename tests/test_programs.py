"""Programs whose standard streams are closed, without a reader, on a full disk, or of an encoding that lacks
characters."""

import os
import subprocess
import sys

import pytest

from tests.test_layering import ROOT

TASKS = [sys.executable, "-m", "megatron_taipan.evaluation"]  # prints more than a line, and imports little
SAYS = (
    "from megatron_taipan.programs import exits_cleanly\n@exits_cleanly\ndef main():\n    {}\nraise SystemExit(main())"
)


def run(command: list[str], **options) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | options.pop("env", {})
    return subprocess.run(command, cwd=ROOT, stderr=subprocess.PIPE, env=environment, text=True, **options)


BUFFERED = pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
NOT_WRITTEN = "error: standard output was not written: No space left on device; free some space, or send it elsewhere\n"


@BUFFERED
def test_a_reader_that_has_enough_ends_a_program_silently(unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    done = run(TASKS, stdout=writer, env={"PYTHONUNBUFFERED": unbuffered})
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_and_its_help():
    shell = ["sh", "-c", '("$@"; echo $? >&2) | true', "sh", *TASKS, "curves", "--help"]
    assert run(shell, env={"PYTHONUNBUFFERED": ""}).stderr == "141\n"


def on_full_disk(command: list[str], unbuffered: str = "") -> tuple[int, str]:
    """Exit status and what stands on stderr of a program whose output goes to a full disk."""
    with open("/dev/full", "w") as full:
        done = run(command, stdout=full, env={"PYTHONUNBUFFERED": unbuffered})
    return done.returncode, done.stderr


PRINT_AND_WRITE = "from megatron_taipan.errors import writing\n    with writing('OUT'): print(1, flush=True)"


@BUFFERED
@pytest.mark.parametrize(
    "command",
    [
        TASKS,
        [*TASKS, "curves", "--help"],  # argparse ends by itself, and hides what it could not write
        [sys.executable, "-m", "data_prep", "recipes"],
        [sys.executable, "launch/pretrain.py", "--config", "launch/configs/taipan_190m.yaml", "--dry-run"],
        [sys.executable, "launch/pretrain.py", "--help"],
        [sys.executable, "-c", SAYS.format("print(1)")],
        [sys.executable, "-c", SAYS.format(PRINT_AND_WRITE)],  # it is not OUT that lacks room
    ],
    ids=["tasks", "help of a task", "recipes", "dry run", "help of pretrain", "print", "print while writing"],
)
def test_a_full_disk_of_standard_output_is_one_line(command, unbuffered):
    assert on_full_disk(command, unbuffered) == (2, NOT_WRITTEN)


@BUFFERED
def test_what_ended_a_program_is_told_on_a_full_disk_too(unbuffered):
    """And only that: without room for what was printed before."""
    kept = "import sys; sys.stdout = open(1, 'w', closefd=False)\n"  # a block of lines waits in it, whatever the mode
    wrong = "from megatron_taipan.errors import UserError\n    print(1); raise UserError('too many')"
    assert on_full_disk([sys.executable, "-c", kept + SAYS.format(wrong)], unbuffered) == (2, "error: too many\n")
    status, said = on_full_disk([sys.executable, "-c", kept + SAYS.format("print(1); [][1]")], unbuffered)
    assert status == 1 and said.endswith("IndexError: list index out of range\n") and "No space" not in said


@BUFFERED
def test_the_exit_status_stays_where_nothing_can_be_said(unbuffered):
    """A run's log on a full disk: its status decides whether it starts again."""
    late = "import sys; from megatron_taipan.parallel.processes import leave\ntry: print(1, file=sys.stderr)\nexcept"
    for command, status in (
        (["-m", "megatron_taipan.evaluation", "unknown"], 2),
        (["launch/pretrain.py", "--config", "nowhere.yaml"], 2),
        (["-c", f"{late} OSError: pass\nleave(75)"], 75),
    ):
        shell = ["sh", "-c", 'exec "$@" >/dev/full 2>&1', "sh", sys.executable, *command]
        assert run(shell, env={"PYTHONUNBUFFERED": unbuffered}).returncode == status, command


def test_another_broken_pipe_stays_a_defect():
    """As one to a worker: it must not look like a reader that has enough."""
    program = SAYS.format("import os; r, w = os.pipe(); os.close(r); print(1); os.write(w, b'1')")
    done = run([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert done.returncode == 1 and "BrokenPipeError" in done.stderr and done.stdout == "1\n"


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_a_character_that_the_locale_lacks_is_an_escape(encoding):
    environment = {"PYTHONIOENCODING": encoding}  # as LC_ALL=de_DE or LANG=C without UTF-8 mode
    program = SAYS.format(r"print('1\u20132 \udce9')")
    done = run([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\\u20132 \\udce9\n", "")


def test_closed_streams_are_dev_null():
    """Else the first file that is opened would be what libraries take for stderr, and `sys.stderr.isatty()` fail."""
    program = SAYS.format(
        "import os, sys; print(sys.stderr.isatty(), sys.stdin.read()); os.write(2, b'lost');"
        " return os.open('.', os.O_RDONLY) < 3"
    )
    shell = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", sys.executable, "-c", program]
    assert run(shell, stdout=subprocess.PIPE).returncode == 0
