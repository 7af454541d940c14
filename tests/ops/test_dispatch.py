"""Which implementation runs, and that it is said."""

import pytest
import torch

from megatron_taipan.errors import UserError
from megatron_taipan.ops import dispatch
from megatron_taipan.ops.dispatch import REFERENCES, pick_ops

NAMES = ("ssd", "causal_conv1d", "rms_norm", "gated_rms_norm", "interval_attention", "linear_cross_entropy")


@pytest.fixture
def kernel(monkeypatch) -> list:
    """A kernel for rms_norm that this machine could run if it had a GPU; the list holds its calls."""
    calls = []

    def fast(*args):
        calls.append(args)

    monkeypatch.setattr(dispatch, "FAST", {"rms_norm": ("invented(triton)", lambda: fast)})
    return calls


def test_every_operation_stands_in_the_one_line_report():
    report = pick_ops("auto").report
    assert report.startswith("ops: ") and "\n" not in report
    assert all(f"{name}=" in report for name in NAMES)


def test_reference_takes_no_kernel_even_where_one_runs(monkeypatch, kernel):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ops = pick_ops("reference")
    assert all(getattr(ops, name) is REFERENCES[name] for name in NAMES)
    assert "rms_norm=reference (asked for)" in ops.report


def test_auto_says_why_there_is_no_kernel(monkeypatch, kernel):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "rms_norm=reference (no CUDA)" in pick_ops("auto").report


def test_fast_is_refused_without_a_gpu_and_names_the_kernel(monkeypatch, kernel):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"ops\.backend=fast.*rms_norm.*no CUDA"):
        pick_ops("fast")


def test_interpreted_kernels_take_cpu_tensors(monkeypatch, kernel):
    monkeypatch.setattr(dispatch, "takes_kernels", lambda x: True)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        ops = pick_ops("auto")
    x = torch.ones(2)
    ops.rms_norm(x, x, 1e-5)
    assert len(kernel) == 1 and kernel[0][0] is x


def test_fast_is_refused_where_a_package_lacks(monkeypatch):
    def load():
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(dispatch, "FAST", {"ssd": ("ours(triton)", load)})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="ssd.*No module named 'triton'"):
        pick_ops("fast")
    assert "ssd=reference (No module named 'triton')" in pick_ops("auto").report


def test_with_a_gpu_the_kernel_is_named_but_cpu_tensors_take_the_reference(monkeypatch, kernel):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ops = pick_ops("fast")
    assert "rms_norm=invented(triton)" in ops.report
    x, weight = torch.randn(2, 4), torch.ones(4)
    assert torch.equal(ops.rms_norm(x, weight, 1e-5), REFERENCES["rms_norm"](x, weight, 1e-5))
    assert not kernel
