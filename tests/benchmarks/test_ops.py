"""`python -m benchmarks ops` on a CPU: stand-ins for the packages, small sizes, no clock."""

import json

import pytest
import torch
import torch.nn.functional as F

from benchmarks import common
from benchmarks import ops as benchmark
from benchmarks.__main__ import main
from megatron_taipan.model import attention, layers, mamba2
from megatron_taipan.ops import dispatch
from megatron_taipan.ops.fast import FUSIONS
from megatron_taipan.ops.operations import REFERENCES
from tests.ops import fake_libraries


def no_triton():
    raise ImportError("No module named 'triton'")


@pytest.fixture
def small(monkeypatch):
    fake_libraries.install(monkeypatch)
    monkeypatch.setattr(dispatch, "FAST", {name: ("triton", lambda f=f: f) for name, f in REFERENCES.items()})
    mix = lambda zxbcdt, *a, out_weight, **k: F.linear(zxbcdt[..., : 2 * 32], out_weight)  # noqa: E731
    for name, (_, parts) in FUSIONS.items():
        monkeypatch.setitem(FUSIONS, name, (no_triton, parts))
    monkeypatch.setitem(FUSIONS, "mamba2_mix", (lambda: mix, FUSIONS["mamba2_mix"][1]))
    for module in (dispatch, attention, layers, mamba2):
        monkeypatch.setattr(module, "takes_kernels", lambda x: True)
    sizes = {"HEADS": 2, "HEADDIM": 16, "D_STATE": 16, "ATTENTION_HEADS": 2, "HEAD_DIM": 16, "WINDOW": 5, "D_MODEL": 32}
    for name, value in (sizes | {"VOCAB": 40, "DEVICE": "cpu", "median_ms": lambda run: run() is None or 1.0}).items():
        monkeypatch.setattr(benchmark, name, value)
    monkeypatch.setattr(common, "hardware", dict)
    monkeypatch.setattr(common.gc, "collect", lambda: 0)  # after each row, and slow
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


def test_every_implementation_has_a_row_or_a_reason(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(fake_libraries.VERSIONS, "liger-kernel", "0.1")
    small_sizes = ["--batch", "2", "--length", "16", "--documents", "4", "--reference", "--out", str(tmp_path)]
    assert main(["ops", *small_sizes]) == 0
    found = {row["what"]: row for row in json.loads((tmp_path / "benchmark_ops.json").read_text())["rows"]}
    assert not [what for what, row in found.items() if "failed" in row], capsys.readouterr()
    skipped = {what for what, row in found.items() if "skipped" in row}
    assert skipped == {
        "attention A, 4 documents a row, sdpa", "attention W, whole rows, sdpa", "attention W, 4 documents a row, sdpa",
        "cross_entropy, liger",
    }  # fmt: skip
    assert "0.1 is installed" in found["cross_entropy, liger"]["skipped"]
    for what in ("ssd, whole rows, mamba_ssm", "conv, 4 documents a row, causal_conv1d", "cross_entropy, cce"):
        assert found[what]["forward+backward ms"] == 1.0
    assert "mixer, whole rows, causal_conv1d and mamba_ssm" in found and "ssd, whole rows: fastest" in found


def test_only_some_rows(small, tmp_path, capsys):
    assert main(["ops", "--batch", "1", "--length", "8", "--only", "cross_entropy, cce", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("forward ms") == 1 and "cross_entropy, cce" in printed
