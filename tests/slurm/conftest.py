"""One cluster for all tests of this folder, and a checkout whose python may be a stand-in."""

import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.distributed.launch import ROOT
from tests.slurm.cluster import Cluster, missing, wait_for
from tests.train.toy import toy_tree


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    if absent := missing():
        reason = f"{', '.join(absent)} not installed (Debian: apt-get install slurm-wlm munge)"
        if os.environ.get("CI") and os.geteuid() == 0:
            pytest.fail(f"{reason}: .ci/run installs them where CI is set")
        pytest.skip(reason)
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def slurm(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster without jobs of other tests."""
    yield cluster
    cluster.cancel_all()


@dataclass(frozen=True)
class Checkout:
    """A folder that looks like the root of the checkout to the batch script."""

    folder: Path

    def stand_in(self, text: str) -> None:
        """Makes .venv, where python is a shell script that plays the trainer. It notes every start in `starts`."""
        # the script's own question about restarts is answered by the real program
        self._make(f"""case $1 in launch/slurm/* | -c) {real_python()} "$@"; exit ;; esac
echo "rank $SLURM_PROCID of $SLURM_STEP_NUM_TASKS, restart ${{SLURM_RESTART_COUNT:-0}}: $*" >> starts
{text}
""")

    def real(self, options: str = "") -> None:
        """Makes .venv with the python that runs the tests."""
        self._make(f'exec {real_python()} {options} "$@"\n')

    def _make(self, text: str) -> None:
        folder = self.folder / ".venv/bin"
        folder.mkdir(parents=True)
        (folder / "activate").write_text(f'PATH={shlex.quote(str(folder))}:"$PATH"\n')
        (folder / "python").write_text(f"#!/bin/bash\n{text}")
        (folder / "python").chmod(0o755)

    def starts(self) -> list[str]:
        file = self.folder / "starts"
        return file.read_text().splitlines() if file.exists() else []

    def until_started(self, count: int) -> None:
        wait_for(lambda: len(self.starts()) >= count, f"start {count} of a stand-in", 60, self.log)

    def log(self) -> str:
        """What the jobs printed."""
        return "".join(file.read_text(errors="replace") for file in sorted(self.folder.glob("log-*")))


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    (tmp_path / "launch").symlink_to(ROOT / "launch")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(toy_tree("data", tmp_path / "run")))
    return Checkout(tmp_path)


def real_python() -> str:
    return f"env OMP_NUM_THREADS=1 PYTHONPATH={shlex.quote(str(ROOT))} {shlex.quote(sys.executable)}"
