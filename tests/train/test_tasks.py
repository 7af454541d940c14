"""Tasks after saves: what they find, what they leave alone, and how they fail, time out, wait and come again."""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from megatron_taipan.checkpoint.folder import checkpoints
from megatron_taipan.checkpoint.metadata import Progress
from megatron_taipan.config_errors import ConfigError
from megatron_taipan.config_loading import make_config
from megatron_taipan.config_text import dump_config
from megatron_taipan.errors import EXIT_REQUEUE, UserError
from megatron_taipan.evaluation import perplexity
from megatron_taipan.evaluation.__main__ import TASKS
from megatron_taipan.plain_yaml import parse_yaml
from megatron_taipan.task_config import TaskConfig, meaning_of_tasks
from megatron_taipan.train.dry_run import dry_run
from megatron_taipan.train.metrics import Metrics
from megatron_taipan.train.task_results import curves, read_results
from megatron_taipan.train.tasks import Tasks, Turn, command_of, environment
from tests.distributed.launch import launch
from tests.distributed.series import Job, launch_series
from tests.train.runs import log, numbers, records, runs
from tests.train.test_logs import fake_wandb
from tests.train.toy import toy_config, toy_tree, write_data

FILES = """printf '{"files": %d}\\n' $(ls {checkpoint}/state | wc -l)"""  # of the checkpoint, when it is printed
SETTINGS = """echo first; printf '{"step": %d, "rank": %d, "nice": %d, "threads": %d, "gpus": %d}\\n' \\
  {step} ${RANK-7} $(nice) $OMP_NUM_THREADS ${#CUDA_VISIBLE_DEVICES} # {checkpoint}"""
HANG = "sleep 100 & echo $! > {out}/pid; wait # {checkpoint}"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """with: 6 steps on two ranks, a checkpoint every 2 of which one is kept, and tasks. without: no tasks."""
    folder = tmp_path_factory.mktemp("tasks")
    trees = [toy_tree(write_data(folder / "data"), folder / name) for name in ("with", "without")]
    for tree in trees:
        tree["checkpoint"] |= {"save_every": 2, "keep_last": 1}
        tree["log"] |= {"tensorboard": True}
    last_step = f"""until grep -q '"step", "step": 6' {folder}/with/log.jsonl; do sleep 0.1; done; """
    trees[0]["tasks"] = [
        {"name": "quick", "every": 2, "command": SETTINGS},
        {"name": "slow", "command": last_step + FILES},
        {"name": "fails", "every": 6, "command": "echo no >&2; exit 3 # {checkpoint}"},
        {"name": "hangs", "every": 6, "command": HANG, "timeout_s": 1},
        {"name": "wrong", "every": 6, "command": "echo '{\"a\": \"{step}\"}' # {checkpoint}"},
        {"name": "ppl", "every": 6, "evaluation": "perplexity", "args": "--samples 5 --batch 2"},
    ]  # fmt: skip
    assert launch_series([Job(2, runs, trees)])[0][0] == [0, 0]
    return folder


def results(place: Path, name: str) -> dict[int, dict]:
    return {r["step"]: r for r in log(place / "with", "task") if r["task"] == name}


def alarms(place: Path, name: str) -> list[str]:
    return [r["text"] for r in log(place / "with", "alarm") if r.get("task") == name]


def test_the_training_is_the_same_with_and_without(place):
    assert len(numbers(place / "with")) == 6
    assert numbers(place / "with") == numbers(place / "without")


def test_a_command_s_numbers_are_logged_at_their_step(place):
    found = results(place, "quick")
    assert 6 in found and 2 in found and set(found) <= {2, 4, 6}
    for step, record in found.items():  # rank 7: the variable is not there
        assert record["values"] == {"step": step, "rank": 7, "nice": 19, "threads": 1, "gpus": 0}
        kept = json.loads((place / f"with/tasks/quick/step_{step:08d}/result.json").read_text())
        assert kept["values"] == record["values"]


def test_an_evaluation_finds_what_its_program_finds_by_hand(place, tmp_path):
    assert (
        perplexity.main([str(place / "with/step_00000006"), *"--samples 5 --batch 2 --out".split(), str(tmp_path)]) == 0
    )
    (expected,) = json.loads((tmp_path / "perplexity.json").read_text())["rows"]
    (row,) = results(place, "ppl")[6]["rows"]
    assert row["cross entropy"] == pytest.approx(expected["cross entropy"], rel=1e-6)
    assert row["tokens"] == expected["tokens"] and row["perplexity"] != 0


def test_a_slow_task_leaves_turns_out_but_not_the_last_and_its_checkpoint_stays_meanwhile(place):
    found = results(place, "slow")
    assert sorted(found) == [2, 6] and all(r["values"]["files"] == 3 for r in found.values())
    (left_out,) = alarms(place, "slow")
    assert "task slow of step 4 is left out: task slow of step 2 has not ended" in left_out
    everything = records(place / "with")
    steps = [i for i, r in enumerate(everything) if r["event"] == "step"]
    assert everything.index(found[2]) > steps[-1]  # the run did not wait for it
    held = [r["text"] for r in log(place / "with", "held")]
    assert any("step_00000002 is not deleted yet: task" in text for text in held)
    assert [path.name for path in checkpoints(place / "with")] == ["step_00000006"]


def test_what_fails_or_hangs_is_an_alarm(place):
    (failed,), (hung,), (wrong,) = (alarms(place, name) for name in ("fails", "hangs", "wrong"))
    assert "task fails of step 6: it ended with status 3" in failed
    assert (place / "with/tasks/fails/step_00000006/stderr.txt").read_text() == "no\n"
    assert "did not end in 1 s (its timeout_s)" in hung
    assert "values that are not numbers" in wrong
    assert not any(results(place, name) for name in ("fails", "hangs", "wrong"))
    assert "status 3" in json.loads((place / "with/tasks/fails/step_00000006/result.json").read_text())["fault"]
    assert ended(int((place / "with/tasks/hangs/step_00000006/out/pid").read_text()))


def test_tensorboard_has_them_at_their_step(place):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(place / "with/tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("tasks/slow/files")] == [2, 6]
    (drawn,) = events.Scalars("tasks/ppl/cross entropy")
    assert drawn.step == 6 and drawn.value == pytest.approx(results(place, "ppl")[6]["rows"][0]["cross entropy"])
    assert {e.step for e in events.Scalars("train/loss")} == {1, 2, 3, 4, 5, 6}


def run_until_a_task_runs(tree: dict, pid: str, number: int) -> int:
    """Trains; sends this process the signal as soon as the file `pid` is there."""
    from megatron_taipan.parallel.processes import find_place
    from megatron_taipan.train.loop import train

    def watch() -> None:
        while not (Path(pid).exists() and Path(pid).read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=watch, daemon=True).start()
    return train(make_config(tree), find_place(os.environ), torch.device("cpu"))


def ended(pid: int, within: float = 10.0) -> bool:
    end = time.monotonic() + within
    while time.monotonic() < end:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_task_that_a_signal_or_a_kill_interrupts_runs_again(tmp_path, number):
    tree = toy_tree(write_data(tmp_path / "data"), tmp_path / "run", train={"steps": 20, "global_batch": 2})
    tree["checkpoint"] |= {"save_every": 5, "keep_last": 1}
    pid, flag = tmp_path / "pid", tmp_path / "flag"
    command = f"if [ -e {flag} ]; then {FILES}; else echo $$ > {pid}; sleep 100; fi"
    tree["tasks"] = [{"name": "t", "every": 5, "command": command}]
    if number == signal.SIGTERM:
        assert launch(1, run_until_a_task_runs, tree, str(pid), number)[0] == EXIT_REQUEUE
    else:
        with pytest.raises(AssertionError):
            launch(1, run_until_a_task_runs, tree, str(pid), number)
    assert ended(int(pid.read_text()))  # a killed run's too
    assert not log(tmp_path / "run", "task") and (tmp_path / "run/step_00000005").exists()
    flag.touch()
    assert launch(1, runs, [tree])[0] == [0]
    found = {r["step"]: r["values"]["files"] for r in log(tmp_path / "run", "task")}
    assert found[5] == found[20] == 2
    assert any("task t of step 5 has no result yet" in r["text"] for r in log(tmp_path / "run", "tasks"))
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["step_00000020"]
    before = len(log(tmp_path / "run", "task"))
    assert launch(1, runs, [tree])[0] == [0]  # all have their results: nothing runs twice
    assert len(log(tmp_path / "run", "task")) == before


class Notes:
    """What tasks report, instead of a run's log."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.found: dict[int, dict] = {}

    def note(self, event: str, text: str, **values: Any) -> None:
        self.events.append(f"{event}: {text}")

    def after_task(self, step: int, task: str, results: dict, curves: dict, seconds: float) -> None:
        self.found[step] = curves


def poll_until(tasks: Tasks, notes: Notes, step: int) -> None:
    end = time.monotonic() + 30
    while step not in notes.found and time.monotonic() < end:
        tasks.poll()
        time.sleep(0.05)


@pytest.fixture
def tasks(tmp_path) -> Iterator[Tasks]:
    """A task that hangs while the file `hang` is there, with turns every 4 steps; saves come by the clock too."""
    command = f"while [ -e {tmp_path}/hang ]; do sleep 0.1; done; echo '{{\"a\": '{{step}}'}}' # {{checkpoint}}"
    config = toy_config("p", tmp_path / "run", checkpoint={"save_minutes": 1}, train={"steps": 20})
    config.tasks = [TaskConfig(name="t", every=4, command=command, wait_s=0.3)]
    with Tasks(config, Notes()) as tasks:
        yield tasks


def test_turns_come_at_the_first_save_at_or_after_their_step(tasks, tmp_path):
    for step in (3, 5, 6, 9):
        tasks.after_save(step, tmp_path / "run/step")
        if step in (5, 9):
            poll_until(tasks, tasks.metrics, step)
    assert tasks.metrics.found == {5: {"a": 5}, 9: {"a": 9}} and not tasks.running


def test_a_turn_whose_step_is_taken_back_is_forgotten_and_comes_again(tasks, tmp_path):
    (tmp_path / "hang").touch()
    tasks.after_save(8, tmp_path / "run/step_00000008")
    (running,) = tasks.running.values()
    assert tasks.hold(tmp_path / "run/step_00000008") and not tasks.hold(tmp_path / "run/step_00000004")
    tasks.take_back(4)
    assert not (tmp_path / "run/tasks/t/step_00000008").exists()
    running.process.wait(10)
    (tmp_path / "hang").unlink()
    tasks.after_save(8, tmp_path / "run/step_00000008")
    poll_until(tasks, tasks.metrics, 8)
    assert tasks.metrics.found == {8: {"a": 8}} and not tasks.metrics.events[1:]


def test_a_finished_run_waits_so_long(tasks, tmp_path):
    (tmp_path / "hang").touch()
    beats: list[int] = []
    tasks.after_save(20, tmp_path / "run/step_00000020")
    assert tasks.finish(lambda: False, lambda: beats.append(1)) is False and beats
    assert "waits for task t of step 20 (up to 0.3 s)" in tasks.metrics.events[0]
    assert "alarm: task t of step 20 has not ended 0.3 s after the run" in tasks.metrics.events[1]
    assert not (tmp_path / "run/tasks/t/step_00000020/result.json").exists()
    assert tasks.hold(tmp_path / "run/step_00000020")  # the next start takes it


def test_a_signal_ends_the_wait_and_what_is_undone_keeps_its_checkpoint(tasks, tmp_path):
    (tmp_path / "hang").touch()
    tasks.after_save(20, tmp_path / "run/step_00000020")
    (running,) = tasks.running.values()
    assert tasks.finish(lambda: True, lambda: None) is True
    running.process.wait(10)
    tasks.after_save(20, tmp_path / "run/step_00000020")  # a last save that is tried again
    tasks.poll()
    assert not tasks.running and tasks.hold(tmp_path / "run/step_00000020")
    assert tasks.finish(lambda: False, lambda: None) is True


def test_what_cannot_be_started_is_an_alarm(tasks, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/tasks").touch()  # where its folder would be
    tasks.after_save(4, tmp_path / "run/step_00000004")
    (said,) = tasks.metrics.events
    assert said.startswith("alarm: task t of step 4: NotADirectoryError") and not tasks.waiting


@pytest.mark.parametrize(
    ("printed", "fault"),
    [
        ('{"\\ud800": 1}', "a name that no board can write"),
        ('{"a": 1, "' + "b" * 70_000 + '": 2}', "more than 65,536 bytes"),
    ],
)
def test_numbers_that_no_board_can_draw_are_an_alarm(tmp_path, printed, fault):
    (tmp_path / "stdout").write_text(f"first\n{printed}\n")
    with pytest.raises(UserError, match=fault):
        read_results(TaskConfig(**GOOD), tmp_path, tmp_path / "stdout")
    (tmp_path / "stdout").write_text("x" * 70_000 + '\n{"é": 1}\n')
    assert read_results(TaskConfig(**GOOD), tmp_path, tmp_path / "stdout") == {"values": {"é": 1}}


def test_a_path_with_a_placeholder_in_it_stays_itself(tmp_path):
    checkpoint = tmp_path / "{step} {out}" / "step_00000004"
    turn = Turn(TaskConfig(**GOOD | {"command": "ls {checkpoint} {step} ${step} {{x}}"}), 4, checkpoint, tmp_path)
    assert command_of(turn)[-1] == f"ls '{checkpoint}' 4 ${{step}} {{{{x}}}}"


def test_wandb_gets_results_at_their_step_though_the_run_is_further(tmp_path, monkeypatch):
    runs = fake_wandb(monkeypatch)
    config = toy_config("p", tmp_path, log={"tensorboard": False, "wandb": True})
    with Metrics(config, Progress(step=9), flops_per_token=1.0, devices=1, writes=True) as metrics:
        metrics.after_task(4, "t", {"values": {"a": 1.5, "b": None}}, {"a": 1.5}, 2.0)
    assert ("*", {"step_metric": "step"}) in runs[0].metrics  # its own counter only runs forward
    assert runs[0].logged == [{"tasks/t/a": 1.5, "step": 4}]
    assert [(r["step"], r["task"], r["values"]) for r in log(tmp_path, "task")] == [(4, "t", {"a": 1.5, "b": None})]


GOOD = {"name": "a", "every": 4, "command": "true {checkpoint}"}


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([GOOD | {"every": 3}], "every=3 is a multiple neither of checkpoint.save_every=4 nor .*save_weights_every=0"),
        ([GOOD, GOOD], "two of tasks have the name a"),
        ([GOOD | {"name": "../a"}], r"tasks.0.name='../a': string should match"),
        ([GOOD | {"name": "a" * 101}], r"tasks.0.name=.*at most 100 characters"),
        ([GOOD | {"command": "true \0 {checkpoint}"}], "tasks.0.command: .* has a zero byte"),
        ([{"name": "a", "evaluation": "qa", "args": ["\ud800"]}], "tasks.0.args: .* half a surrogate pair"),
        ([GOOD | {"command": "true"}], "has no {checkpoint}"),
        ([GOOD | {"command": "true ${checkpoint}"}], "has no {checkpoint}"),
        ([GOOD | {"command": "true {checkpoint} {ouT}"}], "{ouT} is not a placeholder; did you mean {out}"),
        ([GOOD | {"command": None}], "either `evaluation` or `command`, and has neither"),
        ([GOOD | {"evaluation": "qa"}], "and has both"),
        ([{"name": "a", "evaluation": "perplexty"}], "input should be 'perplexity', 'retrieval'"),
        ([{"name": "a", "evaluation": "qa", "args": "--out=x"}], "the run gives --out"),
        ([GOOD | {"device": "cuda"}], "device='cuda'"),
        ([GOOD | {"timeout": 3}], "unknown key 'tasks.0.timeout'; did you mean tasks.0.timeout_s"),
    ],
)
def test_bad_settings_are_refused(tasks, message):
    tree = toy_tree("p", "d")
    tree["checkpoint"]["save_every"] = 4
    with pytest.raises(ConfigError, match=message):
        make_config(tree | {"tasks": tasks})


def test_good_settings_are_shown_and_kept(tmp_path):
    tree = toy_tree(write_data(tmp_path / "data"), tmp_path / "run")
    tree["checkpoint"] |= {"save_every": 4, "save_weights_every": 3}
    clock = GOOD | {"name": "weights", "every": 6, "command": "awk '{print}' ${HOME} {checkpoint}"}
    config = make_config(
        tree | {"tasks": [GOOD, clock, {"name": "b", "evaluation": "qa", "args": "--data 'a b' -x 3"}]}
    )
    assert config.tasks[2].args == ["--data", "a b", "-x", "3"]
    assert make_config(parse_yaml(dump_config(config))) == config
    lines = [line for line in dry_run(config, 1) if line.startswith("task ")]
    assert lines[0].endswith("a: true {checkpoint}, every 4 steps, on cpu") and "b: qa --data a b" in lines[2]
    tree["checkpoint"]["save_minutes"] = 5
    assert make_config(tree | {"tasks": [GOOD | {"every": 7}]})  # saves by the clock come at any step


def test_a_task_on_a_gpu_sees_that_one_and_is_no_rank(monkeypatch):
    told = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_RANK", "TORCHELASTIC_RUN_ID", "SLURM_PROCID"}
    told |= {f"{mpi}_{what}" for mpi in ("OMPI_COMM_WORLD", "PMI", "MV2_COMM_WORLD") for what in ("RANK", "SIZE")}
    for name in told:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("LOCAL_DATA", "stays")
    found = environment(TaskConfig(name="a", command="{checkpoint}", device="cuda:3", threads=2))
    assert found["CUDA_VISIBLE_DEVICES"] == "3" and found["OMP_NUM_THREADS"] == "2" and found["LOCAL_DATA"] == "stays"
    assert not told & found.keys()


def test_evaluations_to_choose_are_known_to_the_evaluation_program_and_to_help():
    names = get_args(get_args(TaskConfig.model_fields["evaluation"].annotation)[0])
    assert len(names) == 6 and set(names) <= TASKS.keys()
    assert all(name in meaning_of_tasks() for name in [*names, *TaskConfig.model_fields])


def test_curves_of_a_table_are_named_by_what_its_rows_are_about():
    rows = [
        {"model": "m", "kind": "needle", "length": 1024, "depth": 0.5, "asked": 4, "accuracy": 0.75, "note": None},
        {"model": "m", "kind": "recall", "length": None, "depth": None, "asked": 4, "accuracy": 0.0, "note": "x"},
    ]
    assert curves({"rows": rows}) == {"needle/length 1024/depth 0.5/accuracy": 0.75, "recall/accuracy": 0.0}
