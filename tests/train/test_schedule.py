"""What changes over training: the learning rate against torch's own schedulers, the gate's schedules against numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_taipan.gate_config import GateConfig, Schedule
from megatron_taipan.optim_config import OptimConfig
from megatron_taipan.stages import Stage
from megatron_taipan.train.schedule import (
    describe_gate,
    every_query_at,
    gate_step,
    learning_rate,
    scheduled,
    scheduled_sum,
)


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


def by_share(share, **more) -> GateConfig:
    return GateConfig(gradient="sampled", gradient_share=share, **more)


@settings(max_examples=40)
@given(
    start=st.floats(0, 1), end=st.floats(0, 1), after=st.floats(0, 1), width=st.floats(0, 1), run=st.integers(1, 80),
    shape=st.sampled_from(["linear", "cosine"]),
)  # fmt: skip
def test_a_share_that_changes_is_taken_as_often_as_it_says(start, end, after, width, run, shape):
    """Its sum against numpy's, by the trapezoidal rule; and the steps counted."""
    plan = Schedule(start=start, end=end, after=after, until=max(1e-3, min(1.0, after + width)), shape=shape)
    fine = np.arange(20 * (run + 20) + 1) / 20
    values = np.array([scheduled(plan, place, run) for place in fine])
    sums = np.concatenate([[0], np.cumsum((values[1:] + values[:-1]) / 40)])[::20]
    found = [scheduled_sum(plan, step, run) for step in range(run + 21)]
    assert found == pytest.approx(sums, abs=0.03)  # a jump between two of numpy's places costs up to 1/40
    taken = np.cumsum([every_query_at(by_share(plan), step, run) for step in range(run + 20)])
    assert np.abs(taken - sums[1:]).max() < 1.03


def test_every_query_at_first_and_every_tenth_at_last():
    plan = {"start": 1.0, "end": 0.1, "after": 0.3, "until": 0.7}
    gate = by_share(plan)
    taken = [gate_step(gate, step, 1000, [], 1).every_query for step in range(1000)]
    assert all(taken[:300]) and sum(taken) == pytest.approx(300 + 400 * 0.55 + 30, abs=1)
    last = [step for step in range(700, 1000) if taken[step]]
    assert {later - earlier for earlier, later in zip(last, last[1:], strict=False)} == {10}
    assert not every_query_at(GateConfig(gradient_share=plan), 0, 1000)  # gradient=selected
    assert every_query_at(GateConfig(gradient="all", gradient_share=plan), 999, 1000)
    none_at_last = by_share({**plan, "end": 0.0})
    assert not any(every_query_at(none_at_last, step, 1000) for step in range(701, 1100))
    assert "gradient_share 1 until step 300, linear to 0.1 at step 700" in describe_gate(gate, 1000)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.3, 1.0])
def test_a_constant_share_takes_the_steps_that_it_always_took(share):
    """Old runs go on with the same steps: floor((step + 1) share) > floor(step share), in a stage too."""
    expected = [int((step + 1) * share) > int(step * share) for step in range(500)]
    assert [every_query_at(by_share(share), step, 77) for step in range(500)] == expected
    config = object()
    own = Stage(1, "", 100, 500, config, frozenset({"gradient_share"}))
    assert [every_query_at(by_share(share), step, 77, own) for step in range(500)] == expected


def test_a_stages_own_share_counts_from_its_first_step():
    plan = Schedule(start=1.0, end=0.25, after=0.25, until=0.5)
    alone = [every_query_at(by_share(plan), step, 40) for step in range(40)]
    own = Stage(1, "", 60, 100, object(), frozenset({"gradient_share"}))
    assert [every_query_at(by_share(plan), 60 + step, 1000, own) for step in range(40)] == alone
    of_the_run = Stage(1, "", 60, 100, object())
    assert all(every_query_at(by_share(plan), 60 + step, 1000, of_the_run) for step in range(40))


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (0.0, "that is gradient=selected"),
        (1.5, "1.5 is not a share"),
        ({"start": -0.1, "end": 1.0}, "-0.1 is not a share"),
        ({"start": 1.0, "end": 2.0}, "2 is not a share"),
    ],
)
def test_shares_that_are_none_are_refused(share, message):
    with pytest.raises(ValueError, match=message):
        GateConfig(gradient_share=share)
