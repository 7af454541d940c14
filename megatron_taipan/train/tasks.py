"""Tasks after saves: processes of their own that read a checkpoint while training goes on; rank 0 alone has them.

    checkpoint.dir/tasks/NAME/step_00001000/     one turn of a task
        turn.json                                 the checkpoint that it reads; written before it starts
        stdout.txt, stderr.txt                    what it prints
        out/                                      {out}, an evaluation's --out
        result.json                               its numbers, or its fault; written when it has ended

A turn without result.json was interrupted, and the next start of the run takes it again. Nothing here waits, except
at the end of a run that has finished, and nothing here ends a run: what goes wrong is an alarm.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import megatron_taipan
from megatron_taipan.checkpoint.files import write_text
from megatron_taipan.checkpoint.folder import FULL, WEIGHTS, checkpoints, folder_name, incomplete, step_of
from megatron_taipan.config import Config
from megatron_taipan.errors import UserError
from megatron_taipan.parallel.rank_environment import without_rank
from megatron_taipan.task_config import PLACEHOLDER, TaskConfig
from megatron_taipan.train.metrics import Metrics
from megatron_taipan.train.task_process import GRACE_S, TIMED_OUT
from megatron_taipan.train.task_results import curves, read_results
from megatron_taipan.untrusted import parse_json

FOLDER, TURN, RESULT, STDOUT, STDERR, OUT = "tasks", "turn.json", "result.json", "stdout.txt", "stderr.txt", "out"
POLL_S = 0.1  # while a finished run waits


@dataclass(frozen=True)
class Turn:
    """A task on one checkpoint."""

    task: TaskConfig
    step: int
    checkpoint: Path
    folder: Path

    def __str__(self) -> str:
        return f"task {self.task.name} of step {self.step}"


@dataclass
class Running:
    """A turn's process."""

    turn: Turn
    process: subprocess.Popen
    began: float
    dropped: bool = False  # whether it was told to end, and its result is not wanted


class Tasks:
    """The tasks of a run. While entered; on leaving, those that still run are ended, to be taken again."""

    def __init__(self, config: Config, metrics: Metrics):
        self.tasks, self.metrics = config.tasks, metrics
        self.directory = Path(config.checkpoint.dir)
        self.last = min(config.train.stop_at or config.train.steps, config.train.steps)
        self.reached = {task.name: 0 for task in self.tasks}  # the step of each one's newest turn
        self.running: dict[str, Running] = {}
        self.waiting: list[Turn] = []  # behind another turn of the same task
        self.undone: list[Turn] = []  # for the next start of the run
        self.told: set[str] = set()  # checkpoints that were said to be held
        self.stopped = False

    def __enter__(self) -> "Tasks":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        end = time.monotonic() + GRACE_S + 2
        for running in self.running.values():
            with suppress(subprocess.TimeoutExpired):
                running.process.wait(max(end - time.monotonic(), 0))

    def resume(self, step: int, resumed_from: Path | None) -> None:
        """Takes turns again that have no result, at a start of the run from `step` steps."""
        with self._alarms("tasks of the start before"):
            for task in self.tasks:
                self.reached[task.name] = step
                for folder in checkpoints(self.directory / FOLDER / task.name):  # they are named alike
                    of = step_of(folder) or 0
                    if of <= step and not (folder / RESULT).exists():
                        self._take_again(Turn(task, of, self.directory / _named_in(folder / TURN), folder))
                # a kill can come between a save and its turn
                if resumed_from is not None and resumed_from.parent == self.directory:
                    turn = self._turn(task, step, resumed_from)
                    if not turn.folder.exists() and (task.every is None or step % task.every == 0 or step == self.last):
                        self._add(turn)

    def after_save(self, step: int, checkpoint: Path) -> None:
        """Starts every task whose turn it is, on a checkpoint that has just become complete."""
        for task in self.tasks:
            before, self.reached[task.name] = self.reached[task.name], step
            if not (step >= self.last or task.every is None or step // task.every > before // task.every):
                self.reached[task.name] = before
                continue
            turn, running = self._turn(task, step, checkpoint), self.running.get(task.name)
            if turn.folder in [other.folder for other in self._readers()]:
                continue  # a last save of both kinds that is tried again
            late = [str(running.turn)] if running and not running.dropped else []
            late += [str(other) for other in self.waiting if other.task.name == task.name]
            if late and step < self.last:
                self.metrics.note(
                    "alarm", f"{turn} is left out: {late[0]} has not ended; give it a larger every, or less to do",
                    task=task.name, of_step=step,
                )  # fmt: skip
                continue
            with self._alarms(str(turn)):
                self._add(turn)

    def poll(self) -> None:
        """Takes the results of those that have ended, and starts those that waited for them; does not wait."""
        for name, running in list(self.running.items()):
            status = running.process.poll()
            if status is not None:
                del self.running[name]
                with self._alarms(str(running.turn)):
                    self._ended(running, status)
        if not self.stopped and self.waiting:
            for turn in list(self.waiting):
                if turn.task.name not in self.running:
                    self.waiting.remove(turn)
                    with self._alarms(str(turn)):
                        self._start(turn)

    def hold(self, checkpoint: Path) -> bool:
        """Whether a task reads that checkpoint or will, perhaps at the next start, so that it must stay; said once."""
        held = [turn for turn in self._readers() if turn.checkpoint == checkpoint]
        if held and checkpoint.name not in self.told:
            self.told.add(checkpoint.name)
            self.metrics.note("held", f"{checkpoint} is not deleted yet: {held[0]} reads it")
        return bool(held)

    def take_back(self, after: int) -> None:
        """Ends the tasks of later steps, whose checkpoints are going to be deleted, and forgets their turns."""
        self.waiting = [turn for turn in self.waiting if turn.step <= after]
        for running in self.running.values():
            if running.turn.step > after:
                self._end(running)
        with self._alarms(f"tasks of steps after {after}"):
            for task in self.tasks:
                self.reached[task.name] = min(self.reached[task.name], after)
                for folder in checkpoints(self.directory / FOLDER / task.name):
                    if (step_of(folder) or 0) > after:
                        shutil.rmtree(folder, ignore_errors=True)

    def stop(self) -> None:
        """Tells those that run to end, and starts no more; the next start of the run takes their turns again."""
        self.stopped = True
        self.undone, self.waiting = self._readers(), []
        for running in self.running.values():
            self._end(running)

    def finish(self, stopping: Callable[[], bool], beat: Callable[[], None]) -> bool:
        """Waits for them at the end of a run that has finished, each up to its wait_s.

        Args:
            stopping: whether a signal has come.
            beat: told that nothing hangs.

        Returns:
            Whether a signal left turns undone, which another start of the run would take.
        """
        began = time.monotonic()
        self.poll()
        if self.stopped:
            return bool(self.undone)
        if readers := self._readers():
            each = ", ".join(f"{turn} (up to {turn.task.wait_s:g} s)" for turn in readers)
            self.metrics.note("tasks", f"the run has finished and waits for {each}")
        while self.waiting or any(not running.dropped for running in self.running.values()):
            if stopping():
                self.stop()
                return bool(self.undone)
            beat()
            waited = time.monotonic() - began
            for turn in [t for t in self.waiting if waited > t.task.wait_s]:
                self.waiting.remove(turn)
                self._give_up(turn)
            for running in self.running.values():
                if waited > running.turn.task.wait_s and not running.dropped:
                    self._end(running)
                    self._give_up(running.turn)
            time.sleep(POLL_S)
            self.poll()
        return False

    def _readers(self) -> list[Turn]:
        """The turns that are not over: those that run, that wait, and that the next start takes."""
        running = [running.turn for running in self.running.values() if not running.dropped]
        return [*running, *self.waiting, *self.undone]

    def _give_up(self, turn: Turn) -> None:
        self.undone.append(turn)
        self.metrics.note(
            "alarm", f"{turn} has not ended {turn.task.wait_s:g} s after the run (its wait_s): it is ended; the same"
            " command takes it again", task=turn.task.name, of_step=turn.step,
        )  # fmt: skip

    def _turn(self, task: TaskConfig, step: int, checkpoint: Path) -> Turn:
        return Turn(task, step, checkpoint, self.directory / FOLDER / task.name / folder_name(step))

    def _take_again(self, turn: Turn) -> None:
        """Queues a turn of an earlier start, if its checkpoint is still there."""
        fault = "its checkpoint is not known" if turn.checkpoint == self.directory else incomplete(turn.checkpoint)
        if fault is not None:
            self._fault(turn, f"it was interrupted and cannot be taken again: {turn.checkpoint.name}: {fault}")
            return
        self.metrics.note("tasks", f"{turn} has no result yet and is taken again")
        self.waiting.append(turn)

    def _add(self, turn: Turn) -> None:
        """Puts a new turn on record, in place of one of the same step that a run passed over; starts it if it can."""
        shutil.rmtree(turn.folder, ignore_errors=True)
        turn.folder.mkdir(parents=True)
        write_text(turn.folder / TURN, json.dumps({"checkpoint": turn.checkpoint.name}) + "\n")
        (self.undone if self.stopped else self.waiting).append(turn)
        self.poll()

    def _start(self, turn: Turn) -> None:
        shutil.rmtree(turn.folder / OUT, ignore_errors=True)  # of an interrupted try
        (turn.folder / OUT).mkdir(parents=True)
        guard = [sys.executable, "-m", "megatron_taipan.train.task_process", str(os.getpid())]
        with open(turn.folder / STDOUT, "wb") as stdout, open(turn.folder / STDERR, "wb") as stderr:
            process = subprocess.Popen(
                [*guard, str(turn.task.timeout_s), *command_of(turn)], stdin=subprocess.DEVNULL, stdout=stdout,
                stderr=stderr, env=environment(turn.task), start_new_session=True,
            )  # fmt: skip
        self.running[turn.task.name] = Running(turn, process, time.monotonic())

    def _end(self, running: Running) -> None:
        running.dropped = True
        running.process.terminate()  # task_process.py ends the command, and the command's children

    def _ended(self, running: Running, status: int) -> None:
        turn, seconds = running.turn, time.monotonic() - running.began
        if running.dropped:
            return
        if status == TIMED_OUT and seconds >= turn.task.timeout_s:
            self._fault(turn, f"it did not end in {turn.task.timeout_s:g} s (its timeout_s)")
        elif status:
            self._fault(turn, f"it ended with status {status}")
        else:
            try:
                results = read_results(turn.task, turn.folder / OUT, turn.folder / STDOUT)
            except UserError as error:
                self._fault(turn, str(error))
                return
            self.metrics.after_task(turn.step, turn.task.name, results, curves(results), seconds)
            _write_result(turn, {"step": turn.step, "s": seconds, **results})  # last: without it, the turn comes again

    def _fault(self, turn: Turn, fault: str) -> None:
        """An alarm; and the turn does not come again, unless its result.json is deleted."""
        self.metrics.note(
            "alarm", f"{turn}: {fault}; what it printed is in {turn.folder}", task=turn.task.name, of_step=turn.step
        )
        _write_result(turn, {"step": turn.step, "fault": fault})

    @contextmanager
    def _alarms(self, what: str) -> Iterator[None]:
        """Whatever is raised within, training goes on."""
        try:
            yield
        except Exception as error:
            self.metrics.note("alarm", f"{what}: {type(error).__name__}: {error}")


def command_of(turn: Turn) -> list[str]:
    """What a turn runs, its placeholders filled in."""
    values = {"checkpoint": str(turn.checkpoint.absolute()), "step": str(turn.step)}
    values["out"] = str((turn.folder / OUT).absolute())
    if turn.task.command is not None:
        return ["/bin/sh", "-c", fill_in(turn.task.command, {k: shlex.quote(v) for k, v in values.items()})]
    arguments = [fill_in(arg, values) for arg in turn.task.args]
    program = [sys.executable, "-m", "megatron_taipan.evaluation", str(turn.task.evaluation)]
    return [*program, values["checkpoint"], *arguments, "--out", values["out"]]


def fill_in(text: str, values: dict[str, str]) -> str:
    """The text with each {name} replaced, in one pass: a path may have braces too. Other braces are the shell's, those
    of its own ${name} too."""
    return PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), text)


def environment(task: TaskConfig) -> dict[str, str]:
    """This process's, without what makes it a rank; with this package, the task's threads and its device."""
    kept = without_rank(os.environ)
    root = Path(megatron_taipan.__file__).resolve().parents[1]
    if root.name not in ("site-packages", "dist-packages"):  # a checkout; launch/pretrain.py put it on the path
        kept["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [kept.get("PYTHONPATH")])])
    kept["OMP_NUM_THREADS"] = str(task.threads)
    kept["CUDA_VISIBLE_DEVICES"] = task.device.removeprefix("cuda:") if task.device != "cpu" else ""
    return kept


def describe_tasks(config: Config) -> Iterator[str]:
    """A line for each task: what, when, where."""
    for task in config.tasks:
        what = task.command if task.evaluation is None else " ".join([task.evaluation, *task.args])
        when = "after every save" if task.every is None else f"every {task.every:,} steps"
        yield f"{task.name}: {what}, {when}, on {task.device}"


def _named_in(file: Path) -> str:
    """The checkpoint that a turn's record names; empty where there is no such name."""
    try:
        name = parse_json(file.read_bytes())["checkpoint"]
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    known = isinstance(name, str) and any(step_of(Path(name), kind) is not None for kind in (FULL, WEIGHTS))
    return name if known and Path(name).name == name else ""


def _write_result(turn: Turn, result: dict) -> None:
    turn.folder.mkdir(parents=True, exist_ok=True)
    write_text(turn.folder / RESULT, json.dumps(result, indent=1, allow_nan=False) + "\n")
