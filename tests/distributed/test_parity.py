"""Every parallel layout computes what one process does."""

import pytest

from tests.distributed.matrix import run_all, run_bf16, table
from tests.distributed.parity import CHOICES, CI_CASES, Case, Setting, covering_cases, possible


@pytest.mark.slow
def test_layouts_equal_one_process():
    done = run_all(CI_CASES)
    assert not any(result["failed"] for _, result in done), "\n" + table(done)


@pytest.mark.slow
def test_layouts_in_bf16_stay_as_close_as_one_process():
    done = run_bf16([case for case in CI_CASES if case.processes == 2], Setting(precision="bf16"))
    assert not any(result["failed"] for _, result in done), "\n" + table(done)


def test_every_possible_pair_of_choices_is_covered():
    cases = covering_cases()
    assert all(possible(case) for case in cases)
    for name, values in CHOICES.items():
        assert {getattr(case, name) for case in cases} == set(values), name
    assert any(c.tensor == 4 and c.n_groups == 1 and c.n_kv_heads == 1 for c in cases)
    assert any(c.pipeline == 2 and c.tensor == 2 for c in cases)


def test_suite_covers_every_choice():
    for name, values in CHOICES.items():
        assert {getattr(case, name) for case in CI_CASES} >= set(values), name
    assert all(possible(case) for case in CI_CASES)
    assert len(set(CI_CASES)) == len(CI_CASES) and isinstance(CI_CASES[0], Case)
