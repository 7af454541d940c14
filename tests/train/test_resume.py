"""A run that is stopped and started again is the uninterrupted run, bit for bit: numbers, weights, random states.

fp16's loss scale has a file of its own, test_loss_scale_resume.py.
"""

import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from megatron_taipan.checkpoint.folder import find_newest
from megatron_taipan.checkpoint.reader import StateReader
from megatron_taipan.config_loading import load_config, make_config
from megatron_taipan.data.loader import build_dataset
from megatron_taipan.errors import EXIT_REQUEUE
from tests.checkpoint.test_loading import everything
from tests.distributed.launch import run_program
from tests.distributed.series import Job, launch_series
from tests.train.runs import log, numbers, runs
from tests.train.toy import VOCAB, toy_tree, write_data

STEPS, CUT = 5, 3


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    return write_data(tmp_path_factory.mktemp("data") / "data")


def drawing(trees: list[dict], cut: bool) -> list:
    """Runs like `runs`, but every step draws from all generators of random numbers and notes what it got.

    Args:
        cut: SIGTERM reaches the last rank between the first and the second micro-batch of step CUT.
    """
    import torch.distributed as dist

    from megatron_taipan.model.taipan import Taipan
    from megatron_taipan.train import loop

    forward, step_of_loop, passes = Taipan.forward, loop.train_step, 0

    def cut_forward(self, tokens, *, step=0, **kwargs):
        nonlocal passes
        if self.training and step == CUT - 1:
            passes += 1
            if passes == 2 and dist.get_rank() == dist.get_world_size() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, tokens, step=step, **kwargs)

    def drawing_step(*arguments, step, **keywords):
        drawn = [step, random.random(), np.random.rand(), torch.rand(()).item()]
        with open(Path(tree["checkpoint"]["dir"]) / f"drawn{dist.get_rank()}", "a") as file:
            file.write(json.dumps(drawn) + "\n")
        return step_of_loop(*arguments, step=step, **keywords)

    loop.train_step = drawing_step
    Taipan.forward = cut_forward if cut else forward
    results = []
    try:
        for tree in trees:
            passes = 0
            results += runs([tree])
    finally:
        loop.train_step, Taipan.forward = step_of_loop, forward
    return results


# in the middle of each schedule when the run is cut; the budget's slope is the share of the step before
SCHEDULES = {
    "capacity": {"start": 0.8, "end": 0.1, "after": 0.2, "until": 0.9}, "tau": {"start": 2.0, "end": 0.5},
    "budget_lambda": {"start": 0.0, "end": 9.0, "after": 2, "until": 5, "shape": "cosine"}, "budget": "batch",
    "gradient": "sampled", "gradient_share": {"start": 0.9, "end": 0.2, "until": 5},
    "refinement": "add", "weight": "one",
}  # fmt: skip


def tree_of(prefix: str, directory: Path, stage: int, tensor: int, precision: str) -> dict:
    """Two processes; two or four micro-batches a step. Stage 1 has the gate's schedules as well."""
    model = toy_tree(prefix, directory)["model"] | ({"gate": SCHEDULES} if stage == 1 else {})
    return toy_tree(
        prefix, directory, model=model, parallel={"zero_stage": stage, "tensor": tensor},
        train={"precision": precision, "steps": STEPS, "eval_every": 2, "eval_samples": 2}, data={"workers": 1},
    )  # fmt: skip


def assert_same_run(whole: Path, parts: Path) -> None:
    assert len(numbers(whole)) == STEPS
    # ranks ask each other before a step: the step after the signal's is the last one
    assert [record["step"] for record in log(parts, "start")] == [0, CUT + 1]
    assert numbers(parts) == numbers(whole)
    assert log(parts, "valid")[-1]["ce"] == log(whole, "valid")[-1]["ce"]
    for rank in range(2):
        assert (parts / f"drawn{rank}").read_text() == (whole / f"drawn{rank}").read_text()
    ours, theirs = (with_random_states(find_newest(path).path) for path in (parts, whole))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key


def with_random_states(path: Path) -> dict[tuple[str, str], torch.Tensor]:
    """All that a checkpoint holds."""
    reader, tensors = StateReader(path, load_config(path / "config.yaml").model), everything(path)
    for rank in range(reader.processes):
        tensors |= {(f"{rank} {name}", "random"): state for name, state in reader.random_states(rank).items()}
    return tensors


def test_fp32_stopped_in_mid_accumulation(tmp_path, prefix):
    cases = [(stage, tensor) for stage in (0, 1, 2, 3) for tensor in (1, 2)]
    whole, parts = (
        [tree_of(prefix, tmp_path / f"{name} {stage} {tensor}", stage, tensor, "fp32") for stage, tensor in cases]
        for name in ("whole", "parts")
    )
    done = launch_series([Job(2, drawing, whole, False), Job(2, drawing, parts, True), Job(2, drawing, parts, False)])
    assert [results[0] for results in done] == [[0] * 8, [EXIT_REQUEUE] * 8, [0] * 8]
    for stage, tensor in cases:
        assert_same_run(tmp_path / f"whole {stage} {tensor}", tmp_path / f"parts {stage} {tensor}")
    data = build_dataset(make_config(whole[0]).data, "train", VOCAB)
    for record in log(tmp_path / "parts 0 1"):  # 8 samples a step: how much of an epoch each step's record says
        assert record[f"epochs/{prefix}"] == 8 * record["step"] / len(data)


def test_bf16_stopped_in_mid_accumulation(tmp_path, prefix):
    """Each part in processes of its own: in one process bf16 products may round differently the second time."""
    cases = [(1, 1), (1, 2), (2, 1), (3, 2)]
    jobs = []
    for stage, tensor in cases:
        whole, parts = (
            tree_of(prefix, tmp_path / f"{name} {stage} {tensor}", stage, tensor, "bf16") for name in ("whole", "parts")
        )
        jobs += [Job(2, drawing, [whole], False), Job(2, drawing, [parts], True), Job(2, drawing, [parts], False)]
    assert [results[0] for results in launch_series(jobs)] == [[0], [EXIT_REQUEUE], [0]] * len(cases)
    for stage, tensor in cases:
        assert_same_run(tmp_path / f"whole {stage} {tensor}", tmp_path / f"parts {stage} {tensor}")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deterministic_mode_on_a_gpu(tmp_path, prefix, precision):
    """The real program, stopped and resumed, with recomputation and accumulation; without CUDA graphs, as in this mode
    always."""

    def run(name: str, **train) -> None:
        options = {"precision": precision, "steps": STEPS, "deterministic": True, **train}
        tree = toy_tree(prefix, tmp_path / name, parallel={"recompute": "selective"}, train=options)
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
        run_program(1, ["launch/pretrain.py", "--config", str(tmp_path / "config.yaml")], on_gpu=True).succeeded()

    run("whole")
    run("parts", stop_at=CUT)
    run("parts")
    whole, parts = ([{k: v for k, v in dict(step).items() if k not in ("mfu", "memory_gb")} for step in
                     numbers(tmp_path / name)] for name in ("whole", "parts"))  # fmt: skip
    # the second start did what was left, or there would be nothing to compare
    assert [record["step"] for record in log(tmp_path / "parts", "start")] == [0, CUT]
    assert len(whole) == STEPS and parts == whole
    ours, theirs = (with_random_states(find_newest(tmp_path / name).path) for name in ("parts", "whole"))
    assert "0 cuda" in {name for name, _ in ours}
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
