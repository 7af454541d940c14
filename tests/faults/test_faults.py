"""One seed of every fault; the count over many is in docs/reliability.md (`python -m tests.faults.run`)."""

from pathlib import Path

import pytest

from tests.faults import cases, launchers
from tests.faults.bench import LAYOUTS, Bench, Unavailable

# in every run of the suite: what damages most when it breaks; the others with `slow`
ALWAYS = [
    cases.kill_a_rank, cases.kill_at_a_file_operation, cases.kill_the_launcher, cases.kill_the_writer,
    cases.sigterm_in_a_step, cases.sigterm_at_start, cases.newest_bit_flipped, cases.second_job,
    cases.full_disk_to_the_end, cases.folder_vanishes, cases.hang,
]  # fmt: skip
REST = [case for case in dict.fromkeys([*cases.KILLS, *cases.OTHERS]) if case not in ALWAYS]
SOME_LAUNCHERS = [launchers.deepspeed_returns_75]


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    bench = Bench(tmp_path_factory.mktemp("faults"))
    yield bench
    bench.close()


@pytest.mark.parametrize(
    "case",
    [*ALWAYS, *(pytest.param(case, marks=pytest.mark.slow) for case in [*REST, *SOME_LAUNCHERS])],
    ids=lambda case: case.__name__,
)
def test_same_command_continues_to_the_same_weights_after(case, bench: Bench, request):
    seed = len(LAYOUTS) * (len(request.node.name) % 2)  # the first layout only, with and without asynchronous saving
    try:
        case(bench, seed)
    except Unavailable as reason:
        pytest.skip(str(reason))


def test_harness_sees_other_weights(bench: Bench, tmp_path: Path):
    """A run that trains differently after its resume must not count as survived."""
    run = cases.make_run(bench, "another learning rate", 0)
    job = run.start()
    run.wait_for_step(5, job)
    job.kill()
    job.wait()
    run.sections |= {"optim": {"lr": 1.1e-2, "min_lr": 1e-3, "warmup_steps": 2}}
    with pytest.raises(AssertionError, match="final weights differ"):
        run.continues_the_same()
