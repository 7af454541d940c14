"""Every parallel layout computes what one process does."""

import pytest

from megatron_taipan.engine.build import check_layout
from megatron_taipan.errors import UserError
from tests.distributed.matrix import run_all, run_bf16, table
from tests.distributed.parity import CHOICES, CI_CASES, Case, Setting, configure, covering_cases, possible


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
    pieces = [c for c in cases if c.context > 1]
    assert {c.context for c in pieces} == {2, 4} and {c.pattern for c in pieces} == set(CHOICES["pattern"])
    assert {c.zero for c in pieces} == {0, 1, 2, 3} and {c.packed for c in pieces} == {True, False}
    assert any(c.data == 2 for c in pieces) and any(c.sequence and c.n_groups < c.tensor for c in pieces)


def test_pieces_and_stages_together_are_no_case_since_they_are_refused():
    case = Case("taipan", context=2, pipeline=2)
    assert not possible(case)
    with pytest.raises(UserError, match="parallel.context=2 needs parallel.pipeline=1, not 2"):
        check_layout(configure(case, Setting()), case.processes)


def test_suite_covers_every_choice():
    for name, values in CHOICES.items():
        assert {getattr(case, name) for case in CI_CASES} >= set(values), name
    assert all(possible(case) for case in CI_CASES)
    assert len(set(CI_CASES)) == len(CI_CASES) and isinstance(CI_CASES[0], Case)
