"""Every stage of a run replays graphs of its own shape, and says so. On a CPU, where a graph calls its layers."""

from unittest import mock

import pytest

from megatron_taipan.engine import build
from tests.distributed.launch import launch
from tests.train.replayed_stages import bf16_stages, check_close, check_replayed, check_said, train_watched
from tests.train.runs import log
from tests.train.toy import write_data

CUT = 4  # inside the second stage


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("stages")
    write_data(tmp / "web"), write_data(tmp / "books", seed=1)
    return tmp


@pytest.fixture(scope="module")
def none(data):
    launch(1, train_watched, bf16_stages(data, "none", cuda_graphs=False), True)
    return data / "none"


def test_each_stage_replays_graphs_of_its_own_shape(data, none):
    (passes,) = launch(1, train_watched, bf16_stages(data, "whole"), True)
    check_replayed(passes)
    check_said(data / "whole")
    check_close(data / "whole", none)
    with pytest.raises(AssertionError):
        check_said(none)


def test_a_resume_inside_a_stage_captures_that_stage_and_the_next(data, none):
    (before,) = launch(1, train_watched, bf16_stages(data, "parts", stop_at=CUT), True)
    (after,) = launch(1, train_watched, bf16_stages(data, "parts"), True)
    check_replayed(before, last=CUT)
    check_replayed(after, first=CUT)
    assert [record["step"] for record in log(data / "parts", "start")] == [0, CUT]
    check_said(data / "parts", starts=2)
    check_close(data / "parts", none)


def no_new_capture(tree: dict):
    """Graphs of the first stage's shape for the whole run, which says otherwise."""
    with mock.patch("megatron_taipan.train.loop.change_stage", old_graphs):
        return train_watched(tree, True)


def old_graphs(engine, before, config, groups, device, stack):
    t = config.train
    build.set_batch(engine, t.micro_batch, build.accumulation(config, groups.data_size), t.global_batch)
    return "layers run as 1 CUDA graphs"


def test_graphs_of_another_stage_are_noticed(data):
    """Of this file's own checks: what the log says would not tell."""
    (passes,) = launch(1, no_new_capture, bf16_stages(data, "stale"))
    check_said(data / "stale")
    with pytest.raises(AssertionError):
        check_replayed(passes)
