"""The batch script, with stand-ins for SLURM's two commands: what is run of SLURM here is the script, not SLURM.

`srun` starts the real program on one task; `scontrol` notes what it was asked for.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from megatron_taipan.checkpoint.folder import find_newest
from tests.distributed.launch import ROOT
from tests.train.runs import log, steps_so_far
from tests.train.toy import toy_tree, write_data

SCRIPT = ROOT / "launch/slurm/pretrain.sbatch"


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(0o755)


def slurm(tmp_path: Path, srun: str, state: object = ("RUNNING",), **env: str) -> dict[str, str]:
    """The environment of a job of one task, where `srun` does what the text says.

    Args:
        state: the job's, as `scontrol --json` tells it; None: it does not know that option.
    """
    (tmp_path / "bin").mkdir(exist_ok=True)
    script(tmp_path / "bin" / "srun", srun)
    (tmp_path / "job.json").write_text(json.dumps({"jobs": [{"job_state": state}]}) if state else "no such option")
    script(
        tmp_path / "bin" / "scontrol",
        f"""if [[ $1 == --json ]]; then
    [[ "$*" == "--json show job 4711" ]] && cat {tmp_path}/job.json
else
    echo "$@" >> {tmp_path}/scontrol
fi
""",
    )
    (tmp_path / "venv/bin").mkdir(parents=True, exist_ok=True)
    (tmp_path / "venv/bin/activate").write_text("")
    return os.environ | {
        "PATH": f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}", "VENV": str(tmp_path / "venv"),
        "SLURM_JOB_ID": "4711", "USER": "user", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **env,
    }  # fmt: skip


def asked_scontrol(tmp_path: Path) -> list[str]:
    file = tmp_path / "scontrol"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize(
    "status, restarts, ends_with, requeued",
    [
        (0, 0, 0, False),
        (2, 0, 2, False),  # a wrong configuration would be wrong again
        (75, 99, 0, True),  # pre-emption is no failure, however often
        (143, 0, 0, True),
        (137, 3, 0, True),  # a killed rank
        (70, 10, 70, False),
    ],
)
def test_exit_status_decides_about_the_queue(tmp_path, status, restarts, ends_with, requeued):
    env = slurm(tmp_path, f"exit {status}\n", SLURM_RESTART_COUNT=str(restarts))
    done = subprocess.run(
        ["bash", SCRIPT, "config.yaml"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == ends_with, done.stderr
    assert asked_scontrol(tmp_path) == (["requeue 4711"] if requeued else []), done.stdout


@pytest.mark.parametrize(
    "state, requeued",
    [(["CANCELLED", "COMPLETING"], False), ("CANCELLED", False), (["TIMEOUT", "COMPLETING"], True), (None, True)],
)
def test_a_cancelled_job_does_not_come_back(tmp_path, state, requeued):
    """States as newer and older versions of SLURM tell them."""
    env = slurm(tmp_path, "exit 75\n", state)
    done = subprocess.run(["bash", SCRIPT, "c"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert asked_scontrol(tmp_path) == (["requeue 4711"] if requeued else []), done.stdout
    assert done.returncode == (0 if requeued else 75)


def test_script_survives_the_signal_that_ends_its_step(tmp_path):
    env = slurm(tmp_path, "trap 'sleep 0.3; exit 75' TERM\necho up\nsleep 60 & wait\n")
    job = subprocess.Popen(["bash", SCRIPT, "c"], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True,
                           start_new_session=True)  # fmt: skip
    assert job.stdout.readline() == "up\n"
    os.killpg(job.pid, signal.SIGTERM)  # script and step, as pre-emption does
    assert job.wait(30) == 0
    assert asked_scontrol(tmp_path) == ["requeue 4711"]


def test_arguments_reach_the_program(tmp_path):
    env = slurm(tmp_path, f'printf "%s\\n" "$@" > {tmp_path}/arguments\n')
    subprocess.run(
        ["bash", SCRIPT, "a config.yaml", "model.pattern=(M*3 S)*2 A"], cwd=ROOT, env=env, check=True, timeout=60
    )
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[-3:] == ["--config", "a config.yaml", "model.pattern=(M*3 S)*2 A"]
    assert "--kill-on-bad-exit=1" in arguments and "launch/pretrain.py" in arguments


def test_options_ask_slurm_for_the_warning_before_the_time_is_up():
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", SCRIPT.read_text(), re.M))
    assert re.fullmatch(r"USR1@\d+", options["signal"])  # no "B:": to the tasks, not to the script alone
    assert "requeue" in options and options["open-mode"] == "append"


def test_the_log_lies_in_a_folder_that_a_checkout_has():
    """SLURM makes no folder for it: a job whose log cannot be opened ends at once, without a word."""
    output = re.search(r"^#SBATCH --output=(\S+)$", SCRIPT.read_text(), re.M).group(1)
    if not (ROOT / ".git").exists():
        pytest.skip("no git repository, which would say which folders a checkout has")
    command = ["git", "-c", "safe.directory=*", "ls-files"]  # the checkout may be another user's
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    folders = {".", *(str(Path(file).parent) for file in tracked.splitlines())}
    assert str(Path(output).parent) in folders


def test_tasks_get_the_cores_that_the_job_asked_for(tmp_path):
    """srun reads SRUN_CPUS_PER_TASK; since SLURM 22.05 it ignores what sbatch sets, SLURM_CPUS_PER_TASK."""
    env = slurm(tmp_path, f'echo "$SRUN_CPUS_PER_TASK $OMP_NUM_THREADS" > {tmp_path}/cores\n', SLURM_CPUS_PER_TASK="6")
    subprocess.run(["bash", SCRIPT, "config.yaml"], cwd=ROOT, env=env, check=True, timeout=60)
    assert (tmp_path / "cores").read_text() == "6 6\n"


@pytest.mark.slow
def test_time_limit_saves_requeues_and_the_second_job_finishes(tmp_path):
    """The real program: SIGUSR1 to the task, as `--signal` has it sent; the job's second run ends with status 0."""
    tree = toy_tree(
        write_data(tmp_path / "data"), tmp_path / "run",
        train={"steps": 60, "global_batch": 2, "micro_batch": 2, "precision": "fp32", "eval_every": 0},
    )  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    step = {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "localhost"}
    env = slurm(tmp_path, "while [[ $1 == --* ]]; do shift; done\n"
                f"export {' '.join(f'{k}={shlex.quote(v)}' for k, v in step.items())}\n"
                f"echo $$ > {tmp_path}/task\nexec \"$@\"\n")  # fmt: skip
    job = subprocess.Popen(["bash", SCRIPT, str(tmp_path / "config.yaml")], cwd=ROOT, env=env)
    end = time.monotonic() + 120
    while steps_so_far(tmp_path / "run") < 4:
        assert job.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    os.kill(int((tmp_path / "task").read_text()), signal.SIGUSR1)
    assert job.wait(60) == 0
    assert asked_scontrol(tmp_path) == ["requeue 4711"]
    stopped = log(tmp_path / "run")[-1]["step"]
    assert stopped < 60 and find_newest(tmp_path / "run").path.name == f"step_{stopped:08d}"

    again = env | {"SLURM_RESTART_COUNT": "1"}
    assert (
        subprocess.run(["bash", SCRIPT, str(tmp_path / "config.yaml")], cwd=ROOT, env=again, timeout=150).returncode
        == 0
    )
    assert [r["step"] for r in log(tmp_path / "run")] == list(range(1, 61))
    assert len(asked_scontrol(tmp_path)) == 1
