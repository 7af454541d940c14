"""Runs that are interrupted, that meet numbers which are not finite, that hang, or that start twice."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import yaml

from megatron_taipan.checkpoint.folder import find_newest
from megatron_taipan.checkpoint.lock import FolderLock
from megatron_taipan.errors import EXIT_HANG, EXIT_REQUEUE, UserError
from megatron_taipan.parallel.processes import free_port
from megatron_taipan.train.persistence import FolderGuard
from megatron_taipan.train.watchdog import Watchdog
from tests.distributed.launch import ROOT, launch, process_env, wait
from tests.train.runs import log, numbers, runs, steps_so_far, with_options
from tests.train.toy import toy_tree, write_data

SHORT = {"global_batch": 4, "micro_batch": 2, "precision": "fp32", "eval_every": 0, "eval_samples": 2}


class Running:
    """The real program in the background, on several processes."""

    def __init__(self, folder: Path, tree: dict, processes: int = 2):
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(tree))
        port = free_port()
        self.outputs = [tempfile.TemporaryFile() for _ in range(processes)]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "launch/pretrain.py", "--config", str(config)],
                cwd=ROOT, env=process_env(rank, processes, port), stdout=output, stderr=output, start_new_session=True,
            )
            for rank, output in enumerate(self.outputs)
        ]  # fmt: skip

    def wait_for(self, directory: Path, step: int) -> None:
        """Until that step is in the log."""
        end = time.monotonic() + 180
        while time.monotonic() < end:
            if steps_so_far(directory) >= step:
                return
            time.sleep(0.02)
        raise AssertionError(f"step {step} was never reached: {self.output()}")

    def finish(self, timeout: float = 180) -> list[int | None]:
        return wait(self.processes, timeout)

    def output(self) -> str:
        texts = []
        for file in self.outputs:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
        return "\n---\n".join(texts)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    return write_data(tmp_path_factory.mktemp("data") / "data")


def test_a_signal_to_any_rank_saves_and_the_same_command_continues_bit_equal(tmp_path, prefix):
    tree = toy_tree(prefix, tmp_path / "cut", train=SHORT | {"steps": 120})
    for number, victims in ((signal.SIGTERM, [1]), (signal.SIGUSR2, [0, 1])):
        running = Running(tmp_path, tree)
        running.wait_for(tmp_path / "cut", 5 if number == signal.SIGTERM else log(tmp_path / "cut")[-1]["step"] + 5)
        for rank in victims:
            os.kill(running.processes[rank].pid, number)
        # rank 0 alone carries the status, see launch/pretrain.py
        assert running.finish() == [EXIT_REQUEUE, 0], running.output()
        stopped_at = log(tmp_path / "cut")[-1]["step"]
        assert stopped_at < 120
        assert find_newest(tmp_path / "cut").path.name == f"step_{stopped_at:08d}"
    launch(2, runs, [tree, with_options(tree, checkpoint={"dir": str(tmp_path / "whole")})])
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")
    assert len(numbers(tmp_path / "cut")) == 120
    ends = log(tmp_path / "cut", "end")
    assert sum(record["steps"] for record in ends) == 120 and len(ends) == 3


def test_an_impatient_second_ctrl_c_leaves_the_exit_status(tmp_path, prefix):
    """The first one has everything saved; the second one meets the program on its way out."""
    running = Running(tmp_path, toy_tree(prefix, tmp_path / "run", train=SHORT | {"steps": 500}), processes=1)
    running.wait_for(tmp_path / "run", 3)
    running.processes[0].send_signal(signal.SIGINT)
    end = time.monotonic() + 60
    while not log(tmp_path / "run", "end") and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.5)
    running.processes[0].send_signal(signal.SIGINT)
    assert running.finish() == [EXIT_REQUEUE], running.output()
    assert "Traceback" not in running.output()


def test_killed_run_continues_from_its_last_save_and_leftovers_vanish(tmp_path, prefix):
    tree = toy_tree(prefix, tmp_path / "run", train=SHORT | {"steps": 60}, checkpoint={"save_every": 4})
    running = Running(tmp_path, tree)
    running.wait_for(tmp_path / "run", 9)
    running.processes[1].kill()
    codes = running.finish()
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, 2), codes  # the other rank ends too, by itself or killed
    (tmp_path / "run" / "step_00000099.tmp").mkdir()
    launch(2, runs, [tree, with_options(tree, checkpoint={"dir": str(tmp_path / "whole")})])
    last = {record["step"]: record["ce"] for record in log(tmp_path / "run")}
    assert last == {record["step"]: record["ce"] for record in log(tmp_path / "whole")}
    assert not list((tmp_path / "run").glob("*.tmp"))


def infinite(stream):
    """A stream with what the layer adds made infinite."""
    return stream._replace(branch=stream.branch * float("inf"))


def poisoned(trees: list[dict], bad_steps: list[int]) -> list:
    """Runs like `runs`, but with an infinite activation in layer 2 of rank 1 at the given steps."""
    import torch.distributed as dist

    from megatron_taipan.engine.pipeline import PipelineLayer
    from megatron_taipan.model.taipan import Taipan

    staged = PipelineLayer.forward

    def with_poison_in_stage(self, payload):
        if not (int(payload[2][0, 0, 5]) in bad_steps and self.index == 2 and self.training):
            return staged(self, payload)
        mixer = self.layer.mixer
        mixer.forward = lambda *arguments: infinite(type(mixer).forward(mixer, *arguments))
        try:
            return staged(self, payload)
        finally:
            del mixer.forward

    forward = Taipan.forward

    def with_poison(self, tokens, *, step=0, **kwargs):
        if not (step in bad_steps and dist.get_rank() == 1 and self.training):
            return forward(self, tokens, step=step, **kwargs)
        mixer = self.layers[2].mixer
        mixer.forward = lambda *arguments: infinite(type(mixer).forward(mixer, *arguments))
        try:
            return forward(self, tokens, step=step, **kwargs)
        finally:
            del mixer.forward

    Taipan.forward, PipelineLayer.forward = with_poison, with_poison_in_stage
    try:
        return runs(trees)
    finally:
        Taipan.forward, PipelineLayer.forward = forward, staged


@pytest.mark.parametrize(
    "precision, parallel",
    [
        ("fp32", {"zero_stage": 0}),
        *(("bf16", {"zero_stage": stage}) for stage in (1, 2, 3)),
        *(("bf16", {"zero_stage": stage, "offload_optimizer": "cpu"}) for stage in (1, 2, 3)),
        ("fp32", {"zero_stage": 1, "pipeline": 2}),  # of two stages rank 1 holds the layers from 2 on
    ],
)
def test_step_that_is_not_finite_on_one_rank_is_skipped_on_all(tmp_path, prefix, precision, parallel):
    train = SHORT | {"steps": 6, "precision": precision}
    tree = toy_tree(prefix, tmp_path / "run", parallel=parallel, train=train)
    assert launch(2, poisoned, [tree], [2])[0] == [0]
    steps = log(tmp_path / "run")
    assert [record["skipped"] for record in steps] == [0, 0, 1, 0, 0, 0]
    assert all(record["ce"] is not None for record in steps if not record["skipped"])
    (note,) = log(tmp_path / "run", "skipped")
    assert "layers.2.mixer" in note["text"] and "rank 1" in note["text"]
    assert log(tmp_path / "run", "end")[0]["skipped"] == 1


def test_a_piece_that_is_not_finite_is_named_and_not_the_gate_that_counts_over_all_pieces(tmp_path, prefix):
    """Rank 0 has the row's first piece, which sees nothing of the second but its share of selected tokens."""
    train = SHORT | {"steps": 4, "precision": "fp32"}
    model = {"pattern": "M S M S"}
    tree = toy_tree(prefix, tmp_path / "run", parallel={"context": 2}, model=model, train=train)
    assert launch(2, poisoned, [tree], [2])[0] == [0]
    assert [record["skipped"] for record in log(tmp_path / "run")] == [0, 0, 1, 0]
    (note,) = log(tmp_path / "run", "skipped")
    assert "layers.2.mixer" in note["text"] and "rank 1" in note["text"]


@pytest.mark.parametrize("cadence", [{"save_every": 0}, {"save_every": 1, "keep_last": 1}], ids=["none", "every step"])
def test_too_many_in_a_row_end_the_run_with_a_checkpoint_of_before(tmp_path, prefix, cadence):
    """Checkpoints that the cadence wrote during the skipped steps are none to continue from."""
    tree = toy_tree(prefix, tmp_path / "run", train=SHORT | {"steps": 8, "max_skipped": 3}, checkpoint=cadence)
    whole = with_options(tree, checkpoint={"dir": str(tmp_path / "whole")})
    for results in launch(2, poisoned, [tree], [2, 3, 4, 5]):
        assert isinstance(results[0], str) and "3 steps in a row" in results[0] and "from step 3" in results[0]
    assert find_newest(tmp_path / "run").path.name == "step_00000002"
    launch(2, runs, [tree, whole])
    resumed = [record["ce"] for record in log(tmp_path / "run")][5:]
    assert resumed == [record["ce"] for record in log(tmp_path / "whole")][2:]


def test_saves_by_the_clock(tmp_path, prefix):
    tree = toy_tree(prefix, tmp_path / "run", checkpoint={"save_minutes": 1e-6, "save_every": 0})
    assert launch(2, runs, [tree])[0] == [0]
    assert [record["step"] for record in log(tmp_path / "run", "save")] == [1, 2, 3, 4, 5, 6]


def test_second_run_in_the_same_folder_is_refused_by_host_and_process(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from megatron_taipan.checkpoint.lock import FolderLock
with FolderLock(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {holder.pid} on {os.uname().nodename}"):
            FolderLock(tmp_path).__enter__()
    finally:
        holder.kill()
        holder.wait()
    with FolderLock(tmp_path):  # a killed process leaves no lock behind
        pass


def test_children_of_the_holder_do_not_hold_the_folder(tmp_path):
    """A loader's workers outlive a killed trainer by seconds."""
    told, tell = os.pipe()
    with FolderLock(tmp_path):
        child = os.fork()
        if not child:
            os.write(tell, b"born")
            time.sleep(60)
            os._exit(0)
        os.read(told, 4)
    try:
        with FolderLock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_folder_whose_name_another_run_has_taken_ends_the_run(tmp_path):
    run = tmp_path / "run"
    with FolderLock(run) as lock:
        guard = FolderGuard(lock, None)  # without metrics: nothing is noted
        guard.check()
        run.rename(tmp_path / "moved")
        with FolderLock(run), pytest.raises(UserError, match=f"{run} is in use by process {os.getpid()} on "):
            guard.check()


def test_folder_that_cannot_be_written_is_an_error_in_words(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        FolderLock(tmp_path / "file" / "run").__enter__()


def hang() -> None:
    with Watchdog(1.0, rank=3) as watchdog:
        for _ in range(3):
            time.sleep(0.6)
            watchdog.beat()  # in time: nothing happens
        threads_wait_here_for_ever()


def threads_wait_here_for_ever() -> None:
    time.sleep(600)


def test_watchdog_shows_the_stacks_and_ends_the_process():
    code = "from tests.train.test_survival import hang; hang()"
    began = time.monotonic()
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert finished.returncode == EXIT_HANG
    assert "rank 3" in finished.stderr and "threads_wait_here_for_ever" in finished.stderr
    assert time.monotonic() - began < 30


def slow_validation(tree: dict) -> list:
    """A run whose validations take longer than train.hang_after_s, though each of their micro-batches does not."""
    from megatron_taipan.train import evaluate

    plain = evaluate._score

    def score(*arguments):
        time.sleep(tree["train"]["hang_after_s"] * 0.4)
        return plain(*arguments)

    evaluate._score = score
    return runs([tree])


def test_a_long_validation_does_not_hang(tmp_path, prefix):
    train = SHORT | {"steps": 1, "micro_batch": 1, "eval_samples": 3, "hang_after_s": 6.0}
    assert launch(1, slow_validation, [toy_tree(prefix, tmp_path / "run", train=train)][0]) == [[0]]
    assert [record["step"] for record in log(tmp_path / "run", "valid")] == [0, 1]


def test_log_is_strict_json_and_complete(tmp_path, prefix):
    train = SHORT | {"steps": 4, "eval_every": 2}
    tree = toy_tree(prefix, tmp_path / "run", log={"tensorboard": True, "every": 2}, train=train)
    assert launch(2, runs, [tree])[0] == [0]
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON")) for line in lines]
    step = [record for record in records if record["event"] == "step"][-1]
    fields = {"loss", "ce", "budget", "grad_norm", "lr", "tokens", "tokens_per_s", "mfu", "memory_gb", "data_wait_s",
              "checkpoint_stall_s", "skipped", "layers.1.selected", "layers.1.alpha"}  # fmt: skip
    assert fields <= set(step)
    assert step["mfu"] is None and step["memory_gb"] > 0.05  # no GPU; a process that holds torch
    assert step["loss"] == pytest.approx(step["ce"] + step["budget"], rel=1e-6)
    assert [record["step"] for record in records if record["event"] == "valid"] == [0, 2, 4]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/ce")] == [2, 4]
    assert board.Scalars("train/ce")[-1].value == pytest.approx(step["ce"], rel=1e-6)
    assert [event.step for event in board.Scalars("valid/perplexity")] == [0, 2, 4]
    assert {f"train/{name}" for name in fields - {"mfu"}} <= set(board.Tags()["scalars"])
    assert {"checkpoint/stall_s", "checkpoint/write_s"} <= set(board.Tags()["scalars"])
    for rank in range(2):  # every rank has a text of its own
        text = (tmp_path / "run" / "logs" / f"rank_{rank:05d}.log").read_text()
        assert "step 4/4" in text and "this rank:" in text
