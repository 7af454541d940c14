"""Stages of a run: which options hold when, what counts from where, and what is refused."""

import re

import pytest

from megatron_taipan.config_errors import ConfigError
from megatron_taipan.config_loading import make_config
from megatron_taipan.config_text import dump_config
from megatron_taipan.engine.build import check_stages
from megatron_taipan.errors import UserError
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.plain_yaml import parse_yaml
from megatron_taipan.stages import plan_stages, stage_at
from megatron_taipan.train.dry_run import dry_run
from megatron_taipan.train.schedule import gate_step, jumps, learning_rate, rate_in_stage
from megatron_taipan.train.shortfalls import shortfalls
from tests.train.toy import toy_tree, write_data

CAPACITY = {"start": 0.8, "end": 0.2, "until": 0.5}


def staged(stages: list, **sections) -> dict:
    tree = toy_tree("web", "run", **sections)
    if "steps" not in sections.get("train", {}):
        tree["train"].pop("steps")
    return tree | {"stages": stages}


def test_each_stage_has_the_run_s_options_but_its_own():
    tree = staged(
        [
            {"steps": 10},
            {"name": "long", "steps": "1K tokens", "data": {"seq_len": 64, "train": ["web", "books"]}},
            {"steps": 5, "train": {"global_batch": 4}, "parallel": {"recompute": "full"}},
        ]
    )
    config = make_config(tree)
    first, long, last = plan_stages(config)
    # 1,000 tokens in steps of 8 x 64 are two
    assert [(stage.first, stage.last) for stage in (first, long, last)] == [(0, 10), (10, 12), (12, 17)]
    assert config.train.steps == 17 and all(stage.config.train.steps == 17 for stage in (first, long, last))
    assert first.config == config.model_copy(update={"stages": []})
    assert [s.prefix for s in long.config.data.train] == ["web", "books"] and long.config.data.seq_len == 64
    assert long.config.train == config.train and last.config.data == config.data
    assert (last.config.train.global_batch, last.config.parallel.recompute) == (4, "full")
    assert [stage_at((first, long, last), step).number for step in (0, 1, 10, 11, 12, 13, 17, 30)] == [
        0, 0, 0, 1, 1, 2, 2, 2,
    ]  # fmt: skip
    assert make_config(parse_yaml(dump_config(config))) == config  # as checkpoints keep it


def test_without_stages_the_one_stage_is_the_configuration():
    config = make_config(toy_tree("web", "run"))
    [stage] = plan_stages(config)
    assert stage.config is config and (stage.first, stage.last) == (0, config.train.steps)
    optim, steps = config.optim, config.train.steps
    assert [rate_in_stage(k, stage) for k in range(steps)] == [learning_rate(k, optim, steps) for k in range(steps)]


def test_a_schedule_counts_from_where_it_is_given():
    tree = staged(
        [
            {"steps": 10, "optim": {"schedule": "constant"}},
            {"steps": 4, "optim": {"schedule": "linear", "lr": 8e-3, "min_lr": 0}},
            {"steps": 10, "model": {"gate": {"capacity": CAPACITY}}},
        ],
        optim={"lr": 1e-2, "min_lr": 0, "warmup_steps": 2, "schedule": "linear"},
    )
    tree["model"]["gate"] = {"tau": {"start": 2.0, "end": 1.0}}
    stages = plan_stages(make_config(tree))
    rates = [rate_in_stage(step, stage) for stage in stages for step in range(stage.first, stage.last)]
    assert rates[:10] == pytest.approx([5e-3] + [1e-2] * 9)  # the run's warm-up, in its first stage
    assert rates[10:14] == pytest.approx([6e-3, 4e-3, 2e-3, 0])  # no second warm-up
    # what the last stage does not give is the run's: from step 2 down to 0 at step 24
    assert rates[14:] == pytest.approx([1e-2 * (24 - taken) / 22 for taken in range(15, 25)])
    gates = [gate_step(s.config.model.gate, k, 24, [], 1, s) for s in stages for k in range(s.first, s.last)]
    assert [gate.tau for gate in gates] == pytest.approx([2 - k / 24 for k in range(24)])
    own = [0.8 - 0.6 * k / 5 for k in range(5)] + [0.2] * 5  # fractions of the stage
    assert [gate.capacity for gate in gates] == pytest.approx([0.15] * 14 + own)


@pytest.mark.parametrize(
    ("stages", "train", "message"),
    [
        ([{"steps": 3}, {"steps": 3}], {"steps": 7}, "take 6 steps together and train.steps=7; set train.steps=6"),
        ([{"name": "a"}, {"steps": 3}], {"steps": 7}, "stages.0 has no length; only the last"),
        ([{"steps": 7}, {}], {"steps": 7}, "take 7 steps, and train.steps=7 leaves none"),
        ([{"steps": 3}, {}], {"steps": "2K tokens"}, "train.steps='2K tokens' is in tokens, and stages may differ"),
        ([{"steps": 3, "train": {"micro_batch": 3}}], {}, "stages.0: .*micro_batch=3 does not divide"),
        ([{"steps": 3, "optim": {"lr": 1e-9}}], {}, "stages.0: min_lr=0.001 is above lr=1e-09"),
        ([{"steps": 3, "data": {"seed": 3}}], {}, "unknown key 'stages.0.data.seed'"),
        ([{"steps": 3, "train": {"gobal_batch": 3}}], {}, "did you mean stages.0.train.global_batch"),
        ([{"steps": 3, "data": {"train": [{"weight": 2}]}}], {}, "stages.0: train.0.prefix"),
    ],
)
def test_what_does_not_fit_is_refused(stages, train, message):
    with pytest.raises(ConfigError, match=message):
        make_config(staged(stages, train=train))


def test_the_last_stage_may_take_what_is_left():
    stages = plan_stages(make_config(staged([{"steps": 3}, {}], train={"steps": 7})))
    assert [stage.steps for stage in stages] == [3, 4]


def test_shortfalls_and_jumps_name_the_stage():
    stages = [{"steps": 10}, {"name": "decay", "steps": 5, "optim": {"warmup_steps": 9}}]
    config = make_config(staged(stages))
    [found] = shortfalls(config, 0, 15)
    assert found.startswith("stage 2 (decay): optim.warmup_steps=9 takes all of its steps=5")
    edited = make_config(staged([stages[0], stages[1] | {"optim": {"lr": 2e-2, "schedule": "constant"}}]))
    assert jumps(config, edited, 4, 15) == []
    assert len(jumps(config, edited, 10, 15)) == 1  # the first step of the second stage


def test_layouts_in_which_stages_cannot_follow_each_other_are_refused():
    rows = [{"steps": 3}, {"steps": 3, "data": {"seq_len": 48}}, {"steps": 3, "data": {"seq_len": 33}}]
    check_stages(make_config(staged(rows)), 1)
    check_stages(make_config(staged(rows[:2], parallel={"tensor": 2})), 2)
    with pytest.raises(UserError, match=r"stage 3: data.seq_len=33 cannot be shared out over parallel.tensor=2 ranks"):
        check_stages(make_config(staged(rows, parallel={"tensor": 2})), 2)
    check_stages(make_config(staged(rows, parallel={"tensor": 2, "sequence": False})), 2)
    with pytest.raises(UserError, match=r"stage 1: data.seq_len=33 cannot .* and stage 2: data.seq_len=48 can"):
        check_stages(make_config(staged([rows[2], rows[1]], parallel={"tensor": 2})), 2)
    pieces = [{"steps": 3, "data": {"seq_len": 34}}, {"steps": 3, "data": {"seq_len": 34}, "parallel": {"context": 2}}]
    with pytest.raises(UserError, match=r"stage 2: data.seq_len=34 / parallel.context=2 = 17 cannot .*remainder 1"):
        check_stages(make_config(staged(pieces, parallel={"tensor": 2})), 4)
    with pytest.raises(UserError, match="stage 2: train.global_batch=6 is not a multiple of train.micro_batch=2 x 2"):
        check_stages(make_config(staged([{"steps": 1}, {"steps": 1, "train": {"global_batch": 6}}])), 2)
    with pytest.raises(UserError, match=r"stage 2 changes data.seq_len, and with parallel.pipeline=2"):
        check_stages(make_config(staged(rows, parallel={"pipeline": 2})), 2)
    decay = [{"steps": 1}, {"steps": 1, "optim": {"lr": 5e-3}, "data": {"train": "books"}}]
    check_stages(make_config(staged(decay, parallel={"pipeline": 2})), 2)


def test_dry_run_shows_each_stage(tmp_path):
    web, books = write_data(tmp_path / "web"), write_data(tmp_path / "books", seed=1)
    tree = staged(
        [{"steps": 30}, {"name": "decay", "steps": "5K tokens", "data": {"train": books, "seq_len": 64},
                         "optim": {"schedule": "linear", "min_lr": 0, "lr": 1e-2}}],
        data={"train": web}, optim={"schedule": "constant"}, checkpoint={"dir": str(tmp_path / "run")},
    )  # fmt: skip
    lines = list(dry_run(make_config(tree), 2))
    text = "\n".join(lines)
    assert "run        40 steps = 12,800 tokens" in text  # 30 x 8 x 32 + 10 x 8 x 64
    per_token = [Taipan(make_config(tree).model).num_flops_per_token(length) for length in (32, 64)]
    operations = 3 * (30 * 8 * 32 * per_token[0] + 10 * 8 * 64 * per_token[1])  # a backward pass costs two forward ones
    assert f"tokens, {operations:.3g} FLOP forward and backward" in text
    epochs = re.findall(r"([\d,]+) samples an epoch, so the stage is ([\d.]+) epochs", text)
    assert [float(n) for _, n in epochs] == pytest.approx(
        [30 * 8 / int(epochs[0][0]), 10 * 8 / int(epochs[1][0])], abs=0.005
    )
    assert "stage 2 (decay): steps 31 to 40 = 5,120 tokens, in rows of 64" in text
    plots = [line for line in lines if line.startswith("schedule")]
    assert plots[0].endswith("from 0.005 to 0.01") and plots[0].startswith("schedule   stage 1 optim.lr")
    assert plots[1].endswith("from 0.009 to 0") and plots[1].startswith("schedule   stage 2 (decay) optim.lr")
    sources = [line for line in lines if line.startswith("sources")]
    assert [name in line for name, line in zip((web, books), sources, strict=True)] == [True, True]
