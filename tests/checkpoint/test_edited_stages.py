"""Stages of a run may be edited as long as they are not done, to the step."""

import pytest

from megatron_taipan.checkpoint.stages import refuse_edited_stages, stage_under_way
from megatron_taipan.config import Config
from megatron_taipan.config_loading import make_config
from megatron_taipan.errors import UserError
from megatron_taipan.stages import plan_stages
from tests.train.toy import toy_tree


def config(*stages: dict, steps: int = 30) -> Config:
    return make_config(toy_tree("data", "run", train={"steps": steps}) | {"stages": [*stages]})


def stage(steps: int | None = None, **train) -> dict:
    return ({"steps": steps} if steps else {}) | ({"train": train} if train else {})


SAVED = config(stage(10), stage(10), stage())


@pytest.mark.parametrize(
    ("ours", "edited"),
    [
        ((stage(10, micro_batch=4), stage(10), stage()), 0),
        ((stage(5), stage(15), stage()), 0),
        ((stage(10), stage(10, micro_batch=4), stage()), 1),
        ((stage(10), stage(15), stage()), 1),
    ],
)
def test_a_stage_is_closed_with_its_last_step(ours, edited):
    last = 10 * (edited + 1)
    refuse_edited_stages("PLACE", SAVED, config(*ours), last - 1)
    for step in (last, last + 1, 30):
        with pytest.raises(UserError, match=rf"PLACE is at step {step}, .*: stages\.{edited}\..*: checkpoint has "):
            refuse_edited_stages("PLACE", SAVED, config(*ours), step)


def test_the_last_stage_may_be_prolonged_and_others_may_follow():
    longer, more = config(stage(10), stage(10), stage(), steps=50), config(*[stage(10)] * 3, stage(9), steps=39)
    for ours in (longer, more):
        refuse_edited_stages("PLACE", SAVED, ours, 30)
    with pytest.raises(UserError, match="stages.1: checkpoint has it, this run nothing"):
        refuse_edited_stages("PLACE", SAVED, config(stage(10), steps=10), 20)


def test_the_stage_under_way():
    plan = plan_stages(SAVED)
    for done, step, number in ((0, 9, 0), (0, 10, 0), (1, 10, 1), (2, 30, 2), (2, 31, 2)):  # the last takes what comes
        assert stage_under_way(plan, done, step, "PLACE").number == number
    with pytest.raises(UserError, match=r"ends at step 10, and checkpoint PLACE .* at step 11; .*stages\.0\.steps=11"):
        stage_under_way(plan, 0, 11, "PLACE")
    with pytest.raises(UserError, match="3 stages are done in checkpoint PLACE, and stages has 3"):
        stage_under_way(plan, 3, 30, "PLACE")
