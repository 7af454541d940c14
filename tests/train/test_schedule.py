"""What changes over training: the learning rate against torch's own schedulers, the gate's schedules against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_taipan.gate_config import GateConfig, Schedule
from megatron_taipan.optim_config import OptimConfig
from megatron_taipan.train.schedule import describe_gate, gate_step, learning_rate, scheduled


def test_equals_torchs_linear_warmup_followed_by_cosine():
    optim = OptimConfig(lr=5e-4, min_lr=1e-5, warmup_steps=7)
    total = 40
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=optim.lr)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (step + 1) / 7)
    expected = []
    for _ in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        warmup.step()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=optim.lr)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - 7, eta_min=optim.min_lr)
    for _ in range(total - 6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert [learning_rate(step, optim, total) for step in range(total)] == pytest.approx(expected, rel=1e-9)
    assert learning_rate(total + 5, optim, total) == optim.min_lr


def test_decay_steps_and_no_warmup():
    optim = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=0, decay_steps=10)
    assert learning_rate(4, optim, 1000) == pytest.approx(0.55)  # half way down
    assert learning_rate(9, optim, 1000) == 0.1
    assert learning_rate(0, OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=4), 8) == 0.25


@pytest.mark.parametrize("shape", ["linear", "1-sqrt", "cosine"])
def test_wsd_equals_transformers_warmup_stable_decay(shape):
    from transformers import get_wsd_schedule

    optim = OptimConfig(lr=1e-3, min_lr=1e-4, warmup_steps=5, schedule="wsd", wsd_decay=shape, wsd_decay_steps=12)
    torchs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=optim.lr)
    theirs = get_wsd_schedule(
        torchs, num_warmup_steps=5, num_decay_steps=12, num_training_steps=40, num_stable_steps=23,
        decay_type=shape, min_lr_ratio=0.1,
    ).lr_lambdas[0]  # fmt: skip
    after = range(5, 40)  # their warm-up begins at the final rate; they count from 0 steps taken
    assert [learning_rate(s, optim, 40) for s in after] == pytest.approx([1e-3 * theirs(s + 1) for s in after])


def test_linear_and_constant_equal_transformers_with_warmup():
    from transformers import get_constant_schedule_with_warmup, get_linear_schedule_with_warmup

    torchs = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    linear = get_linear_schedule_with_warmup(torchs, 4, 20).lr_lambdas[0]
    constant = get_constant_schedule_with_warmup(torchs, 4).lr_lambdas[0]
    for schedule, theirs in (("linear", linear), ("constant", constant)):
        optim = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=4, schedule=schedule)
        assert [learning_rate(s, optim, 20) for s in range(20)] == pytest.approx([theirs(s + 1) for s in range(20)])


def test_wsd_without_a_length_decays_over_the_last_fifth_and_never_into_the_warmup():
    optim = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=10, schedule="wsd", wsd_decay="linear")
    rates = [learning_rate(step, optim, 100) for step in range(100)]
    assert rates[9:80] == [1.0] * 71 and rates[80] == pytest.approx(0.95) and rates[99] == 0.0
    short = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=10, schedule="wsd", wsd_decay="linear", wsd_decay_steps=50)
    assert learning_rate(9, short, 20) == 1.0 and learning_rate(10, short, 20) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "constant", "decay_steps": 5}, "decay_steps=5 with schedule=constant"),
        ({"schedule": "cosine", "wsd_decay_steps": 5}, "wsd_decay_steps=5 with schedule=cosine"),
        ({"schedule": "exponential"}, "cosine"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**options)


def test_warmup_longer_than_the_run_never_passes_the_peak():
    optim = OptimConfig(lr=1.0, min_lr=0.0, warmup_steps=100)
    assert max(learning_rate(step, optim, 10) for step in range(10)) == pytest.approx(0.1)


PLAN = Schedule(start=0.5, end=0.15, after=0.3, until=0.7)


@given(
    start=st.floats(-5, 5),
    end=st.floats(-5, 5),
    after=st.floats(0, 1),
    width=st.floats(0.01, 1),
    run=st.integers(1, 500),
)
def test_a_linear_schedule_is_numpys_interpolation(start, end, after, width, run):
    until = min(1.0, after + width)
    plan = Schedule(start=start, end=end, after=after, until=until)
    ours = [scheduled(plan, step, run) for step in range(run + 3)]
    if until > after:
        assert ours == pytest.approx(np.interp(range(run + 3), [after * run, until * run], [start, end]), abs=1e-9)
    assert ours[-1] == end and ours[0] == (start if until > 0 else end)


def test_a_cosine_schedule_falls_as_torchs():
    plan = Schedule(start=1.0, end=0.2, after=10, until=50, shape="cosine")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.2)
    for step in range(40):
        assert scheduled(plan, 10 + step, 60) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        optimizer.step()
        cosine.step()
    assert [scheduled(plan, step, 60) for step in (0, 10, 50, 59)] == [1.0, 1.0, 0.2, 0.2]


def test_fractions_are_of_the_run_and_larger_numbers_are_steps():
    in_steps = PLAN.model_copy(update={"after": 30.0, "until": 70.0})
    assert all(scheduled(PLAN, step, 100) == pytest.approx(scheduled(in_steps, step, 7)) for step in range(100))
    mixed = Schedule(start=0.0, end=1.0, after=0.5, until=60)  # from step 50 of 100
    assert [scheduled(mixed, step, 100) for step in (50, 55, 60)] == pytest.approx([0, 0.5, 1])
    late = Schedule(start=0.0, end=1.0, after=0.9, until=60)  # in this run it ends before it begins: a jump
    assert [scheduled(late, step, 100) for step in (59, 60, 95)] == [0, 1, 1]
    assert scheduled(0.3, 12, 100) == 0.3


def test_a_step_tells_the_gates_where_their_schedules_stand():
    gate = GateConfig(
        capacity=PLAN, budget_lambda={"start": 0, "end": 4, "until": 100}, budget="batch", gradient="sampled",
        gradient_share=0.5,
    )  # fmt: skip
    first = gate_step(gate, 0, 100, [], 2)
    assert (
        first.vector() == [0.5, 1.0, 0.0, 0.0, 0.5, 0.5] and first.budget == "batch"
    )  # no share yet: C, so nothing pulls
    assert gate_step(gate, 51, 100, [0.2, 0.9], 2).vector() == pytest.approx([0.31625, 1.0, 2.04, 1.0, 0.2, 0.9])
    assert describe_gate(gate, 200) == (
        "capacity 0.5 until step 60, linear to 0.15 at step 140, budget_lambda 0 until step 0, linear to 4 at step 100"
    )
    assert describe_gate(GateConfig(), 200) == ""
