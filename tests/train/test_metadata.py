"""The commit that a checkpoint names is that of the code that made it, or none."""

import os
import subprocess
from pathlib import Path

import pytest

from megatron_taipan.train.metadata import git_commit


@pytest.fixture
def source(tmp_path) -> Path:
    """A file that a repository has."""
    file = tmp_path / "tree" / "package" / "code.py"
    file.parent.mkdir(parents=True)
    file.write_text("1")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "--quiet"], ["add", "."], [*who, "commit", "--quiet", "-m", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path / "tree", check=True)
    return file


def head(source: Path) -> str:
    folder = next(parent for parent in source.parents if (parent / ".git").exists())
    return (folder / ".git" / (folder / ".git/HEAD").read_text().split()[1]).read_text().strip()


def test_the_commit_of_the_tree_and_whether_it_was_changed(source):
    assert git_commit(source) == head(source)
    source.write_text("2")
    assert git_commit(source) == head(source) + "+changes"


def test_a_repository_that_does_not_have_the_file_says_nothing(source, tmp_path):
    installed = source.parent / ".venv" / "site-packages" / "code.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("1")
    assert git_commit(installed) is None
    (tmp_path / "code.py").write_text("1")
    assert git_commit(tmp_path / "code.py") is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a repository to another user")
def test_a_checkout_of_another_user_has_a_commit(source):
    for path in [source.parents[1], *source.parents[1].rglob("*")]:
        os.chown(path, 12345, 12345)
    assert git_commit(source) == head(source)
