"""What the benchmarks share: the dispatcher, the table with its JSON, and the one table of peaks."""

import importlib
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks.common import Table, hardware
from benchmarks.layouts import says_why, settings
from benchmarks.step import our_training, random_batch, select_capacity
from benchmarks.sync import COPIES, PARTS, count_waits, parts_marked
from megatron_taipan.config_loading import make_config
from megatron_taipan.model.taipan import Taipan
from megatron_taipan.train import peaks
from tests.distributed.launch import launch
from tests.train.toy import toy_tree


@pytest.mark.parametrize("what", [name for name, one in benchmarks.BENCHMARKS.items() if one.needs_gpu])
def test_every_benchmark_has_a_program_and_says_without_a_gpu_that_it_needs_one(what, monkeypatch, capsys):
    assert callable(importlib.import_module(f"benchmarks.{what}").run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmarks.main([what]) == 2
    assert "CUDA" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--saves", "--steps-between"])
def test_no_save_is_nothing_to_measure(option, capsys):
    assert benchmarks.main(["checkpoint", "--config", "launch/configs/quickstart.yaml", option, "0"]) == 2
    assert f"{option} 0" in capsys.readouterr().err


def test_rows_are_printed_and_kept_as_json_and_a_failure_is_a_row(tmp_path, capsys):
    table = Table("toy", tmp_path)
    table.attempt("fine", lambda: {"ms": 1.5})
    table.attempt("lacking", lambda: importlib.import_module("no_such_peer"))
    kept = json.loads((tmp_path / "benchmark_toy.json").read_text())
    assert kept["about"]["torch"] == torch.__version__ and kept["rows"][0] == {"what": "fine", "ms": 1.5}
    assert "no_such_peer" in kept["rows"][1]["failed"]
    printed = capsys.readouterr().out
    assert "ms 1.5" in printed and "torch: " in printed


def test_a_ratio_is_ours_by_each_others_that_was_measured(tmp_path):
    table = Table("toy", tmp_path)
    for what, numbers in (("peer", {"tokens/s": 200}), ("ours", {"tokens/s": 300}), ("lacking", {"failed": "no GPU"})):
        table.add(what, **numbers)
    table.ratios("ours", "tokens/s")
    assert table.rows[3:] == [{"what": "ours / peer", "ratio": 1.5}]  # above 1: ours is faster


def test_the_gates_of_a_benchmark_select_about_the_capacity():
    """Of any tokens, in training with its draws and by the mean of alpha."""
    config = make_config(toy_tree("unused", model={"gate": {"capacity": 0.2}}, directory=""))
    model = Taipan(config.model, seed=0)
    select_capacity(model, config)
    tokens = torch.randint(0, 64, (16, 256), generator=torch.Generator().manual_seed(0))
    found = model.named_metrics(model(tokens))
    assert found["layers.1.alpha"].item() == pytest.approx(0.2, abs=1e-6)
    assert found["layers.1.selected"].item() == pytest.approx(0.2, abs=0.03)  # 5 standard deviations


def test_a_gpu_that_only_resembles_a_known_one_has_no_peak(monkeypatch):
    assert peaks.known_peak("NVIDIA H100 80GB HBM3") == pytest.approx(989.4)
    assert peaks.known_peak("NVIDIA H100 PCIe") == pytest.approx(756)
    assert peaks.known_peak("NVIDIA H100 96GB Special") is None and peaks.known_peak(None) is None
    assert peaks.known_peak("NVIDIA H100 80GB HBM3", "fp32") is None  # the table is of 16 bits
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H900")
    assert hardware()["bf16 peak"] == "unknown peak"
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    assert hardware()["bf16 peak"] == "989.4 TFLOP/s"


def event(name, start, end=None):
    return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=start if end is None else end))


def test_waiting_calls_are_counted_by_the_part_of_the_step_they_fall_in():
    events = [
        event("forward", 0, 10), event("backward", 10, 30), event("optimizer step", 40, 60), event("aten::mm", 3),
        event("cudaStreamSynchronize", 5), event("aten::item", 4, 6), event("cudaStreamSynchronize", 12),
        event("cudaStreamSynchronize", 35), event("Memcpy DtoH (Device -> Pinned)", 45),
    ]  # fmt: skip
    calls = count_waits(events)
    assert calls["forward"] == {"cudaStreamSynchronize": 1, "aten::item": 1}
    assert calls["backward"] == calls["between them"] == {"cudaStreamSynchronize": 1}
    assert calls["optimizer step"] == {COPIES: 1}


def test_the_parts_of_a_step_are_named_in_its_profile_and_the_engine_is_left_as_it_was():
    class Engine(torch.nn.Module):
        def forward(self, x):
            return x * 2

        def backward(self, loss):
            loss.backward()

        def step(self):
            return "stepped"

    engine = Engine()
    with parts_marked(engine), torch.profiler.profile() as trace:
        engine.backward(engine(torch.ones((), requires_grad=True)))
        assert engine.step() == "stepped"
    calls = [e.name for e in trace.events() if e.name in PARTS]
    assert calls == list(PARTS)
    assert not {"forward", "backward", "step"} & vars(engine).keys()


def test_rows_of_a_step_hold_the_documents_that_are_asked_for(monkeypatch, capsys):
    config = make_config(toy_tree("unused", train={"micro_batch": 2, "global_batch": 2}, directory=""))
    for documents, length in ((1, config.data.seq_len), (4, config.data.seq_len // 4)):
        rows = random_batch(config, torch.device("cpu"), documents=documents)["seq_idx"]
        found = [torch.unique_consecutive(row, return_counts=True)[1].tolist() for row in rows]
        assert found == [documents * [length]] * 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    whole = ["--overrides", "data.mask_documents=false"]
    for wrong in (["--documents", "0"], ["--documents", "2", *whole], ["--documents", "5000"]):
        assert benchmarks.main(["step", "--only", "nothing", *wrong]) == 2
        assert f"--documents {wrong[1]}: a row of 4096 tokens" in capsys.readouterr().err


def loss_of_one_step(tree: dict) -> float:
    training = our_training(make_config(tree))
    training.step()
    training.end()
    return training.results[0].loss


def test_a_layout_with_pieces_of_rows_trains_on_the_same_rows_as_one_process():
    assert settings("2 context=2 micro_batches=3", 1) == (["parallel.context=2", "train.global_batch=3"], 2, 1)
    assert settings("8 context=2 tensor=2 micro_batch=4", 1)[0][-1] == "train.global_batch=8"
    trees = [toy_tree("unused", train={"global_batch": 2}, parallel={"context": n}, directory="") for n in (1, 2)]
    (alone,), (first, second) = (launch(n, loss_of_one_step, tree) for n, tree in enumerate(trees, 1))
    assert first == second == pytest.approx(alone, rel=1e-6)


def test_a_failed_layout_is_reported_by_the_processs_own_error():
    """Lines as torchrun leaves them, the last ones its own."""
    lines = [
        "[rank0]: RuntimeError: Triton Error [CUDA]: invalid argument", "    raise ChildFailedError(",
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: ", "  error_file: <N/A>",
    ]  # fmt: skip
    assert [line for line in lines if says_why(line)] == lines[:1]
