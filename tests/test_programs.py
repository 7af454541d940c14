"""Programs whose standard streams are closed, without a reader, or of an encoding that lacks characters."""

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
    return subprocess.run(command, stderr=subprocess.PIPE, env=environment, text=True, **options)


@pytest.mark.parametrize("buffered", ["", "1"])
def test_a_reader_that_has_enough_ends_a_program_silently(buffered):
    reader, writer = os.pipe()
    os.close(reader)
    done = run(TASKS, stdout=writer, env={"PYTHONUNBUFFERED": buffered})
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


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
