"""Does every parallel layout compute the same thing? Prints the matrix, failures first.

    python -m tests.distributed.matrix              a set of cases in which every pair of choices occurs
    python -m tests.distributed.matrix --ci         the smaller set that the test suite runs
    python -m tests.distributed.matrix --more 100   and a hundred more, drawn from all possible cases
    python -m tests.distributed.matrix --write docs/parity.md

What a case does and what it is compared with stands in parity.py.
"""

import argparse
import platform
import sys
import time
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from megatron_taipan.errors import UserError
from tests.distributed.launch import launch
from tests.distributed.parity import CI_CASES, LIMITS, Case, all_cases, covering_cases, run_cases


def run_all(cases: list[Case], at_once: int = 12) -> list[tuple[Case, dict[str, Any]]]:
    """Every case with its result, failures first."""
    by_size = defaultdict(list)
    for case in cases:
        by_size[case.processes].append(case)
    done = []
    for size, group in sorted(by_size.items()):
        for start in range(0, len(group), at_once):
            part = group[start : start + at_once]
            began = time.time()
            try:
                results = launch(size, run_cases, part, timeout=60 + 40 * len(part))[0]
            except (AssertionError, UserError) as error:
                if len(part) > 1:  # find out which of them it was
                    done += run_all(part, at_once=1)
                    continue
                results = [{"failed": ["crashed"], "error": str(error)[-1500:]}]
            done += zip(part, results, strict=True)
            print(f"{len(part)} cases on {size} processes: {time.time() - began:.0f} s", file=sys.stderr, flush=True)
    return sorted(done, key=lambda pair: not pair[1]["failed"])


def table(done: list[tuple[Case, dict[str, Any]]]) -> str:
    """Markdown, failures first."""
    names = [f.name for f in fields(Case)]
    head = ["", *names, "loss, step 1", "losses", "norm", "gradients", "weights", "selections"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for case, r in done:
        cells = ["**" + ", ".join(r["failed"]) + "**" if r["failed"] else "ok", *(str(getattr(case, n)) for n in names)]
        if "error" in r:
            cells += ["crashed", *[""] * 5]
        else:
            cells += [f"{r[k]:.1e}" for k in ("loss1", "losses", "norm", "grad", "weights")] + [r["selections"]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ci", action="store_true", help="the small set of cases")
    parser.add_argument("--more", type=int, default=0, help="this many cases besides, drawn from all possible ones")
    parser.add_argument("--write", type=Path, help="write the table to this Markdown file")
    args = parser.parse_args()
    cases = CI_CASES if args.ci else list(dict.fromkeys(covering_cases() + all_cases()[: args.more]))
    done = run_all(cases)
    failures = sum(bool(r["failed"]) for _, r in done)
    for case, r in done:
        if r["failed"]:
            print(f"FAILED {case}: {r['failed']} {r.get('worst', '')}\n{r.get('error', '')}", flush=True)
    print(table(done))
    print(f"{len(done) - failures} of {len(done)} layouts compute the same as one process")
    if args.write:
        command = "python -m tests.distributed.matrix" + (" --ci" if args.ci else "")
        command += f" --more {args.more}" if args.more else ""
        args.write.write_text(
            "# Parity: every layout against one process\n\n"
            f"`{command} --write {args.write}`, {time.strftime('%Y-%m-%d')},"
            f" torch {torch.__version__}, {platform.machine()} CPU, gloo, float32."
            f" {len(done) - failures} of {len(done)} cases pass.\n\n"
            f"Relative differences, the worst of each kind; limits: {LIMITS}."
            f" How each is computed stands at the top of `tests/distributed/parity.py`.\n\n{table(done)}"
        )
    return failures > 0


if __name__ == "__main__":
    sys.exit(main())
