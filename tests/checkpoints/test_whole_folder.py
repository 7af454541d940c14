"""A folder appears whole or not at all; what a killed program leaves is known, and gone after the next."""

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import whole_folder as module
from checkpoints.whole_folder import remove_or_restore_leftovers, whole_folder
from megatron_taipan.errors import UserError

WRITER = """
import sys, time
from pathlib import Path
from checkpoints.whole_folder import whole_folder
with whole_folder(Path(sys.argv[1])) as work:
    (work / "config.json").write_text("half")
    print(work, flush=True)
    time.sleep(600)
"""


def start_writer(out: Path) -> tuple[subprocess.Popen, Path]:
    """A process in the middle of writing, and its folder."""
    command = [sys.executable, "-c", WRITER, str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_what_is_left_of_a_killed_program_goes_and_a_living_ones_stays(tmp_path):
    out = tmp_path / "hf"
    living, its_folder = start_writer(out)
    killed, left = start_writer(out)
    try:
        kill(killed)
        assert left.is_dir() and not out.exists()
        assert remove_or_restore_leftovers(out) == [f"removed {left}, which a killed program had left"]
        assert not left.exists() and (its_folder / "config.json").read_text() == "half"
    finally:
        kill(living)
    assert remove_or_restore_leftovers(out) == [f"removed {its_folder}, which a killed program had left"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("moment", ["before the new one has its name", "after"])
def test_a_kill_between_two_renames_loses_neither(tmp_path, monkeypatch, moment):
    """The earlier folder comes back where nothing stands under its name, and goes where the new one does."""
    out = tmp_path / "hf"
    out.mkdir()
    (out / "config.json").write_text("earlier")
    rename, calls = Path.rename, []

    class Killed(BaseException):
        """Nothing runs after it: also no `finally`."""

    def counted(path, target):
        if len(calls) == (1 if moment == "before the new one has its name" else 2):
            monkeypatch.setattr(module.shutil, "rmtree", lambda *_, **__: None)
            raise Killed
        calls.append((path, target))
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", counted)
        with pytest.raises(Killed), whole_folder(out, overwrite=True) as work:
            (work / "config.json").write_text("new")
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    said = remove_or_restore_leftovers(out)
    if moment == "after":
        assert (out / "config.json").read_text() == "new" and len(said) == 1
    else:
        assert (out / "config.json").read_text() == "earlier"
        assert any(sentence.startswith(f"put {out} back") for sentence in said)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_got_the_name_meanwhile_stays(tmp_path):
    """Two programs that write to one name: neither asked to replace what the other has made."""
    with pytest.raises(UserError, match="another program meanwhile"), whole_folder(tmp_path / "hf") as work:
        (work / "a").write_text("second")
        with whole_folder(tmp_path / "hf") as other:
            (other / "a").write_text("first")
    assert (tmp_path / "hf/a").read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_other_folders_are_left_alone(tmp_path):
    for name in (".hf.settings", ".hf.short.partial", ".other.abcdefgh.partial", "hf.abcdefgh.partial"):
        (tmp_path / name).mkdir()
    assert remove_or_restore_leftovers(tmp_path / "hf") == []
    assert len(list(tmp_path.iterdir())) == 4


def test_without_locks_nothing_is_removed_that_may_be_in_use(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module.fcntl, "flock", no_locks)
    (tmp_path / ".hf.abcdefgh.partial").mkdir()
    (said,) = remove_or_restore_leftovers(tmp_path / "hf")
    assert "left" in said and "alone" in said and (tmp_path / ".hf.abcdefgh.partial").is_dir()
    with whole_folder(tmp_path / "hf") as work:
        (work / "a").write_text("")
    assert (tmp_path / "hf/a").is_file()


def test_an_exception_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "hf"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_another_program_took_for_a_leftover_is_made_again(tmp_path, monkeypatch):
    """It was removed between its making and its lock, which one can still have of a folder that is gone."""
    lock, taken = module._lock, []

    def late(folder):
        handle = lock(folder)
        if not taken:
            folder.rmdir()
        taken.append(folder)
        return handle

    monkeypatch.setattr(module, "_lock", late)
    with whole_folder(tmp_path / "hf") as work:
        (work / "a").write_text("")
    assert (tmp_path / "hf/a").is_file() and len(taken) == 2


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o700), (0o022, 0o755), (0o002, 0o775)])
@pytest.mark.parametrize("bit", [0, stat.S_ISGID])
def test_a_folder_has_the_permissions_of_any_new_folder_there(tmp_path, umask, mode, bit):
    """In a place that a group shares, the group writes to it, and what is put into it is the group's too."""
    tmp_path.chmod(0o755 | bit)
    before = os.umask(umask)
    try:
        with whole_folder(tmp_path / "out") as work:
            (work / "file").write_bytes(b"")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == mode | bit
