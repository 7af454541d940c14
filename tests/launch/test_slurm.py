"""The batch script, with stand-ins for SLURM's two commands: what is run of SLURM here is the script, not SLURM.

`srun` starts the real program on one task; `scontrol` notes what it was asked for. tests/slurm runs it under SLURM.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from launch.slurm.restarts import starts_without_checkpoint
from megatron_taipan.checkpoint.folder import find_newest
from tests.checkpoint.folders import make
from tests.distributed.launch import ROOT
from tests.train.runs import log, steps_so_far
from tests.train.toy import toy_tree, write_data

SCRIPT = ROOT / "launch/slurm/pretrain.sbatch"


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/bash\n{text}")
    path.chmod(0o755)


RUNNING = "JobState=RUNNING Reason=None"


def slurm(tmp_path: Path, srun: str, state: str = RUNNING, **env: str) -> dict[str, str]:
    """The environment of a job of one task, where `srun` does what the text says.

    Args:
        state: what `scontrol show job` says of it.
    """
    (tmp_path / "bin").mkdir(exist_ok=True)
    script(tmp_path / "bin" / "srun", srun)
    script(
        tmp_path / "bin" / "scontrol",
        f"""if [[ $1 == --oneliner ]]; then
    [[ "$*" == "--oneliner show job "* ]] && echo "JobId=4711 Restarts=${{SLURM_RESTART_COUNT:-0}} {state} BatchFlag=1"
else
    echo "$@" >> {tmp_path}/scontrol
fi
""",
    )
    (tmp_path / "venv/bin").mkdir(parents=True, exist_ok=True)
    (tmp_path / "venv/bin/activate").write_text("")
    config = tmp_path / "config.yaml"
    if not config.exists():
        config.write_text(yaml.safe_dump(toy_tree("data", tmp_path / "run")))
    return os.environ | {
        "PATH": f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}", "VENV": str(tmp_path / "venv"),
        "SLURM_JOB_ID": "4711", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT), **env,
    }  # fmt: skip


def run_script(tmp_path: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
    command = ["bash", SCRIPT, tmp_path / "config.yaml"]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)


def asked_scontrol(tmp_path: Path) -> list[str]:
    file = tmp_path / "scontrol"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize(
    "status, ends_with, requeued",
    [
        (0, 0, False),
        (2, 2, False),  # a wrong configuration would be wrong again
        (75, 0, True),
        (143, 0, True),
        (137, 0, True),  # a killed rank
        (70, 0, True),
    ],
)
def test_exit_status_decides_about_the_queue(tmp_path, status, ends_with, requeued):
    env = slurm(tmp_path, f"exit {status}\n", SLURM_RESTART_COUNT="99")
    done = run_script(tmp_path, env)
    assert done.returncode == ends_with, done.stderr
    assert asked_scontrol(tmp_path) == (["requeue 4711"] if requeued else []), done.stdout


@pytest.mark.parametrize("first", [2, 1, 255])
def test_the_first_task_to_fail_decides_and_not_those_that_srun_then_ends(tmp_path, first):
    said = ["a line", f"srun: error: n1: task 1: Exited with exit code {first}", "srun: error: n2: task 0: Terminated"]
    env = slurm(tmp_path, "".join(f"echo '{line}' >&2\n" for line in said) + "exit 143\n")
    done = run_script(tmp_path, env)
    assert done.returncode == (2 if first == 2 else 0)
    assert done.stderr.splitlines()[:3] == said


@pytest.mark.parametrize("trouble", ["log", "temporary files"])
def test_a_full_disk_of_the_head_node_does_not_end_the_run(tmp_path, trouble):
    env = slurm(tmp_path, f"for i in {{1..2000}}; do echo a line of the tasks >&2; done\ntouch {tmp_path}/done\n")
    env |= {"TMPDIR": "/dev/null/no"} if trouble == "temporary files" else {}
    with open("/dev/full" if trouble == "log" else tmp_path / "log", "w") as log:
        command = ["bash", SCRIPT, tmp_path / "config.yaml"]
        assert subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=log, timeout=60).returncode == 0
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize(
    "state, requeued",
    [
        ("JobState=COMPLETING Reason=None EndTime=2026-11-28T21:19:52 PreemptTime=None", False),
        ("JobState=COMPLETING Reason=None", False),
        ("JobState=CANCELLED Reason=None", False),
        ("JobState=COMPLETING Reason=TimeLimit", True),
        ("JobState=COMPLETING Reason=None PreemptTime=2026-11-28T21:19:52", True),
        ("JobState=COMPLETING Reason=None Restarts=1 PreemptTime=2026-11-28T21:19:52", False),  # SLURM did it
        ("slurm_load_jobs error: Unable to contact slurm controller", False),
    ],
)
def test_a_cancelled_job_does_not_come_back(tmp_path, state, requeued):
    """In SLURM's words: a job that it ends, and that neither met its time limit nor was pre-empted, was cancelled."""
    done = run_script(tmp_path, slurm(tmp_path, "exit 75\n", state))
    assert asked_scontrol(tmp_path) == (["requeue 4711"] if requeued else []), done.stdout
    assert done.returncode == (0 if requeued else 75)


def test_restarts_that_bring_no_checkpoint_end(tmp_path):
    env = slurm(tmp_path, "exit 75\n", MAX_RESTARTS="2")
    assert [run_script(tmp_path, env).returncode for _ in range(3)] == [0, 0, 75]
    assert asked_scontrol(tmp_path) == ["requeue 4711"] * 2
    (tmp_path / "run" / "slurm_restarts.json").unlink()
    new_checkpoint = f"""step={tmp_path}/run/step_0000000$((${{SLURM_RESTART_COUNT:-0}} + 1))
mkdir -p $step
echo '{{"format": 1, "files": {{}}}}' > $step/manifest.json
"""
    env = slurm(tmp_path, f"{new_checkpoint}exit 75\n", MAX_RESTARTS="0")
    runs = [run_script(tmp_path, env | {"SLURM_RESTART_COUNT": str(restart)}) for restart in (0, 1, 2, 2)]
    assert [run.returncode for run in runs] == [0, 0, 0, 75]


@pytest.mark.parametrize("restarts, requeued", [(1, True), (2, False)])
def test_where_nothing_can_be_remembered_every_restart_counts(tmp_path, restarts, requeued):
    """The run's folder cannot be written, so no start is known to have brought a checkpoint."""
    (tmp_path / "run").write_text("a file")
    done = run_script(tmp_path, slurm(tmp_path, "exit 75\n", MAX_RESTARTS="2", SLURM_RESTART_COUNT=str(restarts)))
    assert asked_scontrol(tmp_path) == (["requeue 4711"] if requeued else []), done.stdout
    assert done.returncode == (0 if requeued else 75)


def test_steps_that_a_run_takes_back_and_writes_again_are_no_new_checkpoint(tmp_path):
    """As after a loss that jumped: the newest checkpoint is of an earlier step than one before was."""
    counts = []
    for step in (20, 10, 15, 20, 25, None):
        if step is not None:
            shutil.rmtree(tmp_path / "step_00000020", ignore_errors=True)
            make(tmp_path, step)
        counts.append(starts_without_checkpoint(tmp_path, "4711"))
    assert counts == [0, 1, 2, 3, 0, 1]
    assert starts_without_checkpoint(tmp_path, "4712") == 0  # another job's first start


def test_a_job_that_slurm_does_not_take_back_ends_with_its_status(tmp_path):
    env = slurm(tmp_path, "exit 70\n")
    refusing = (tmp_path / "bin" / "scontrol").read_text().removeprefix("#!/bin/bash\n") + "[[ $1 != requeue ]]\n"
    script(tmp_path / "bin" / "scontrol", refusing)
    done = run_script(tmp_path, env)
    assert asked_scontrol(tmp_path) == ["requeue 4711"]
    assert done.returncode == 70 and "SLURM refuses to queue job 4711 again" in done.stdout


def test_a_task_of_an_array_is_named_by_the_array(tmp_path):
    env = slurm(tmp_path, "exit 75\n", SLURM_ARRAY_JOB_ID="4711", SLURM_ARRAY_TASK_ID="3")
    run_script(tmp_path, env)
    assert asked_scontrol(tmp_path) == ["requeue 4711_3"]


def test_without_its_environment_a_job_ends(tmp_path):
    env = slurm(tmp_path, "exit 0\n", VENV="/nowhere")
    done = run_script(tmp_path, env)
    assert done.returncode == 2 and "VENV=/nowhere" in done.stderr


def test_script_survives_the_signal_that_ends_its_step(tmp_path):
    env = slurm(tmp_path, "trap 'sleep 0.3; exit 75' TERM\necho up\nsleep 60 & wait\n")
    job = subprocess.Popen(["bash", SCRIPT, tmp_path / "config.yaml"], cwd=ROOT, env=env, stdout=subprocess.PIPE,
                           text=True, start_new_session=True)  # fmt: skip
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
