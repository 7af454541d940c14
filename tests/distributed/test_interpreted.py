"""A whole network through the kernels, split over ranks of each kind, on CPUs: loss and gradients of one step.

Those of training, but for the rotary embedding (there is no `A`) and attention of every query in one operation.

Run and skipped as tests/ops/test_mamba2_interpreted.py.
"""

from typing import Any
from unittest import mock

import pytest

from tests.distributed.launch import launch, same_packages
from tests.distributed.parity import Case, Setting, run_cases
from tests.ops.devices import interpreted_only

pytestmark = [
    pytest.mark.slow,
    interpreted_only,
]
pytest.importorskip("triton")


# one or more of each operation's, forward and backward: the references give the same numbers
OF_A_STEP = {
    "_norm_forward_kernel", "_norm_backward_kernel",
    "_decay_kernel", "_scan_kernel", "_reverse_kernel", "_token_kernel", "_group_kernel", "_steps_kernel",
    "_gated_forward_kernel", "_gated_backward_kernel",
    "forward_kernel", "ranges_kernel", "dq_kernel", "dkv_kernel",
    "_copy_kernel", "_rows_kernel", "_weight_kernel",
    "_stats_kernel", "_gradient_kernel",
}  # fmt: skip


def run_and_list_kernels(case: Case, setting: Setting) -> tuple[dict[str, Any], set[str]]:
    """`run_cases` of one case, and the kernels that this rank launched."""
    from triton.runtime import interpreter

    launched, launch_kernel = set(), interpreter.GridExecutor.__call__

    def noted(executor: Any, *args: Any, **kwargs: Any) -> None:
        launched.add(executor.fn.__name__)
        launch_kernel(executor, *args, **kwargs)

    with mock.patch.object(interpreter.GridExecutor, "__call__", noted):
        (result,) = run_cases([case], setting, [None])
    return result, launched


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
    (result, of_first), (_, of_second) = launch(2, run_and_list_kernels, case, setting, timeout=900, env=env)
    assert not result["failed"], result
    assert not OF_A_STEP - (of_first | of_second), OF_A_STEP - (of_first | of_second)
    assert case.pipeline > 1 or of_first == of_second  # stages have other layers, and the last one the loss
