"""A whole network through every kernel, split over ranks of each kind, on CPUs: loss and gradients of one step.

Run and skipped as tests/ops/test_mamba2_interpreted.py.
"""

import os

import pytest

from tests.distributed.launch import launch, same_packages
from tests.distributed.parity import Case, Setting, run_cases

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="TRITON_INTERPRET is not 1"),
]
pytest.importorskip("triton")


@pytest.mark.parametrize(
    "case",
    [
        Case("taipan", tensor=2),
        Case("taipan", tensor=2, sequence=True, gate="batch-all"),
        Case("taipan", context=2),  # with batch-all the gates' gradients cancel to rounding, see `possible`
        # a stage gets what belongs to its rows as columns of one tensor, which only several rows show
        Case("taipan", pipeline=2, micro_batch=2, gate="batch-all"),
    ],
    ids=str,
)
def test_kernels_over_two_ranks_give_what_the_references_give_on_one(case):
    setting, env = Setting(interpreted=True), same_packages()
    (result,) = launch(2, run_cases, [case], setting, [None], timeout=900, env=env)[0]
    assert not result["failed"], result
