"""The Triton kernels of interval attention against a dense softmax in float64."""

import os
import subprocess
import sys

import pytest
import torch

from tests.ops.interval_attention_cases import SMALL, Case, check, check_ranges, check_same_bits

pytest.importorskip("triton")

CASES = [
    Case(1031, 0.3, 200, documents=3, padding=77, heads=4, kv_heads=2),
    Case(777, 1.0, 64, documents=4, head_dim=64),  # every token selected
    Case(700, 0.1, 2048, padding=5, kv_heads=1, dtype=torch.float16),  # the window covers all
    Case(333, 0.5, 3, documents=2, padding=3, kv_heads=1, head_dim=64, dtype=torch.float32),  # narrower than any block
    Case(900, 0.2, 128, padding=1500),  # far more padding than selected rows
    Case(641, 0.4, 129, documents=9, heads=3, kv_heads=3),
    Case(4099, 0.15, 2048, documents=2, padding=615, heads=2, kv_heads=2),
    Case(4099, 0.5, 2048, heads=1, kv_heads=1),
    Case(2000, 0.02, 512, heads=8, kv_heads=1),
    Case(500, 0.6, 2),  # itself and the token before
    Case(500, 0.0, 9, padding=130),  # nothing selected
    Case(500, 0.0, 9),  # not even a row
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES + SMALL, ids=str)
def test_output_and_gradients(case):
    check(case, "cuda")


@pytest.mark.gpu
def test_the_same_inputs_give_the_same_bits():
    check_same_bits(Case(3000, 0.2, 500, documents=2, padding=10, heads=4, kv_heads=4), "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in CASES + SMALL if case.density], ids=str)
def test_ranges_of_queries(case):
    check_ranges(case, "cuda")


@pytest.mark.slow
def test_the_kernels_in_the_interpreter_of_triton():
    """Without a GPU; a process of its own, because Triton decides when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.ops.interval_attention_cases"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("passed") == len(SMALL)
