"""train.profile: a trace that another program reads holds the named steps and nothing else; nothing without it."""

import gzip
import json
import pickle

import pytest
import torch

from megatron_taipan.config_errors import ConfigError
from megatron_taipan.train.profiling import StepProfiler
from megatron_taipan.train_config import ProfileConfig
from tests.distributed.launch import launch
from tests.train.runs import log, runs
from tests.train.toy import toy_config, toy_tree, write_data


def names(path) -> list[str]:
    """Events of a trace in Chrome's format, by name."""
    with gzip.open(path, "rt") as file:
        return [event["name"] for event in json.load(file)["traceEvents"] if "name" in event]


def test_traces_hold_the_named_steps_and_their_operators(tmp_path):
    prefix = write_data(tmp_path / "data")

    def tree(name: str, profile: dict | None) -> dict:
        return toy_tree(
            prefix, tmp_path / name, train={"steps": 4, "global_batch": 2, "precision": "fp32", "profile": profile}
        )

    wanted = {"named": {"start": 2, "stop": 3}, "cut short": {"start": 4, "stop": 90}, "elsewhere": {"start": 2,
              "stop": 3, "ranks": [1]}, "never": None}  # fmt: skip
    assert launch(1, runs, [tree(name, profile) for name, profile in wanted.items()])[0] == [0] * 4
    (path,) = (tmp_path / "named" / "profile").iterdir()
    assert path.name == "steps_00000002-00000003_rank0.trace.json.gz"
    events = names(path)
    assert {"step 2", "step 3"} <= set(events) and not {"step 1", "step 4"} & set(events)
    assert events.count("aten::mm") + events.count("aten::addmm") > 20
    assert any("Backward" in name for name in events), "the backward pass is missing"
    assert any("adam" in name.lower() for name in events), "the optimizer is missing"
    (said,) = log(tmp_path / "named", "profile")
    assert "steps 2 to 3" in said["text"]
    (path,) = (tmp_path / "cut short" / "profile").iterdir()
    assert path.name.startswith("steps_00000004-00000004") and "step 4" in names(path)
    assert not (tmp_path / "elsewhere" / "profile").exists() and not (tmp_path / "never" / "profile").exists()
    lines = [[record["ce"] for record in log(tmp_path / name)] for name in wanted]
    assert all(line == lines[0] for line in lines), "profiling changed the training"


def test_a_wrong_range_or_key_is_refused():
    with pytest.raises(ConfigError, match="stop=2 is before start=5"):
        toy_config("x", train={"steps": 4, "global_batch": 2, "profile": {"start": 5, "stop": 2}})
    with pytest.raises(ConfigError, match=r"did you mean train.profile.stop"):
        toy_config("x", train={"steps": 4, "global_batch": 2, "profile": {"start": 5, "stopp": 2}})


@pytest.mark.gpu
def test_on_a_gpu_kernels_are_in_the_trace_and_allocations_in_the_snapshot(tmp_path):
    profiler = StepProfiler(ProfileConfig(start=1, stop=1), tmp_path, rank=0, device=torch.device("cuda"))
    with profiler:
        products = []
        for step in range(3):  # each allocates tensors of a size of its own
            profiler.begin(step)
            rows = 512 * (step + 2)
            products.append(torch.randn(rows, 512, device="cuda") @ torch.randn(512, 512, device="cuda"))
            profiler.end(step)
    trace, snapshot = (next((tmp_path / "profile").glob(f"*.{kind}")) for kind in ("trace.json.gz", "memory.pickle"))
    with gzip.open(trace, "rt") as file:
        kernels = [e["name"] for e in json.load(file)["traceEvents"] if e.get("cat") == "kernel"]
    assert kernels, "no kernel in the trace"
    with snapshot.open("rb") as file:
        events = [event for device in pickle.load(file)["device_traces"] for event in device]
    sizes = [event["size"] for event in events if event["action"] == "alloc"]
    assert [t.numel() * 4 in sizes for t in products] == [False, True, False], sizes
