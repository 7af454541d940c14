"""Tries faults on real training runs and counts what was survived.

    python -m tests.faults.run --seeds 60                                 60 kills, and every other fault twice
    python -m tests.faults.run --seeds 60 --write docs/reliability.md     keeps the table in that file
    python -m tests.faults.run --only hang --seeds 5                      one kind

A fault is survived when the same command, started again, ends with status 0 and with the same bits in parameters and
Adam moments, and the same loss at every step, as the undisturbed run; and when what the case itself asserts about
statuses, messages and kept checkpoints holds (tests/faults/cases.py).
"""

import argparse
import datetime
import os
import platform
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from tests.faults import launchers
from tests.faults.bench import LAYOUTS, Bench, Unavailable
from tests.faults.cases import KILLS, OTHERS

Case = Callable[[Bench, int], None]
COMBINATIONS = 2 * len(LAYOUTS)  # a case's seed, modulo this, decides layout and way of saving
BEGIN, END = "<!-- faults: begin -->", "<!-- faults: end -->"


@dataclass
class CaseResult:
    """The outcome of one case."""

    case: Case
    seed: int
    fate: str  # survived, failed or skipped
    why: str
    seconds: float


def main() -> int:
    """The program; 0 if every fault that could be made was survived."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=60, metavar="N", help="kills; other faults N/30 times each")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first seed")
    parser.add_argument("--only", metavar="NAME", help="only the case of this name, N times")
    parser.add_argument("--no-launchers", action="store_true", help="leave out the cases with torchrun and deepspeed")
    parser.add_argument("--write", type=Path, metavar="FILE", help="puts the table between two marks of this file")
    options = parser.parse_args()

    chosen = choose_cases(options.seeds, options.first, options.only, not options.no_launchers)
    folder = Path(tempfile.mkdtemp(prefix="taipan-faults-"))
    bench, results = Bench(folder), []
    began = time.monotonic()
    try:
        for case, seed in chosen:
            result = attempt(bench, case, seed)
            results.append(result)
            print(f"{result.seconds:6.1f} s  {result.fate:8s}  {case.__name__} {seed}  {result.why}", flush=True)
    finally:
        bench.close()
    seconds = time.monotonic() - began
    table = survival_table(results, seconds)
    print(table)
    failed = [r for r in results if r.fate == "failed"]
    if options.write and not options.only:
        write_between_marks(options.write, table)
    if not failed:
        shutil.rmtree(folder)
    return 1 if failed else 0


def choose_cases(seeds: int, first: int, only: str | None, real: bool) -> list[tuple[Case, int]]:
    """Cases and seeds, in order."""
    every = [*KILLS, *OTHERS, *launchers.CASES]
    if only:
        case = next((c for c in every if c.__name__ == only), None)
        if case is None:
            sys.exit(f"no case {only}; there are {', '.join(sorted({c.__name__ for c in every}))}")
        return [(case, seed) for seed in range(first, first + seeds)]
    # one seed is left out in each round, so that every kind of kill meets every layout and way of saving
    kills = [(KILLS[n % len(KILLS)], n + n // len(KILLS)) for n in range(first, first + seeds)]
    others = [(case, first + n) for n in range(max(seeds // 30, 1)) for case in OTHERS]
    return kills + others + ([(case, first) for case in launchers.CASES] if real else [])


def attempt(bench: Bench, case: Case, seed: int) -> CaseResult:
    """Tries one case; a failure's text goes to stderr."""
    began, fate, why = time.monotonic(), "survived", ""
    try:
        case(bench, seed)
    except Unavailable as reason:
        fate, why = "skipped", str(reason)
    except Exception as error:
        fate, why = "failed", str(error).splitlines()[0] if str(error) else type(error).__name__
        traceback.print_exc()
    return CaseResult(case, seed, fate, why, time.monotonic() - began)


def survival_table(results: list[CaseResult], seconds: float) -> str:
    """The table in Markdown."""
    count = {fate: sum(r.fate == fate for r in results) for fate in ("survived", "failed", "skipped")}
    lines = [
        f"**{count['survived'] + count['failed']} faults tried, {count['survived']} survived**"
        + (f", {count['skipped']} could not be made on this machine" if count["skipped"] else "")
        + f". {datetime.date.today()}, torch {torch.__version__}, {platform.python_implementation()}"
        f" {platform.python_version()}, {os.cpu_count()} CPU cores, {seconds / 60:.0f} minutes.",
        "",
        "| fault | tried | survived |",
        "|---|---:|---:|",
    ]
    for case in dict.fromkeys(r.case for r in results):
        of_case = [r for r in results if r.case is case]
        tried, survived = sum(r.fate != "skipped" for r in of_case), sum(r.fate == "survived" for r in of_case)
        meaning = " ".join(case.__doc__.split()).removesuffix(".")
        lines.append(f"| {meaning} | {tried} | {survived} |")
    for result in results:
        if result.fate == "failed":
            lines.append(f"\nNot survived: `{result.case.__name__}`, seed {result.seed}: {result.why}")
    lines.append(f"\nThe layouts were {'; '.join(LAYOUTS)}, each with asynchronous and with synchronous saving.")
    met = {case: {r.seed % COMBINATIONS for r in results if r.case is case} for case in KILLS}
    if all(met.values()):
        fewest = min(map(len, met.values()))
        lines.append(f"Every kind of kill met at least {fewest} of these {COMBINATIONS} combinations.")
    return "\n".join(lines)


def write_between_marks(file: Path, table: str) -> None:
    """Replaces the text between the marks."""
    text = file.read_text()
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    file.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}")


if __name__ == "__main__":
    sys.exit(main())
