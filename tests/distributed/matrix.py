"""Does every parallel layout compute the same thing? Prints the matrix, failures first.

    python -m tests.distributed.matrix              every pair of choices, Muon, and some layouts of eight processes
    python -m tests.distributed.matrix --ci         the smaller set that the test suite runs
    python -m tests.distributed.matrix --more 100   and a hundred more, drawn from all possible cases
    python -m tests.distributed.matrix --write docs/parity.md
    python -m tests.distributed.matrix --gpus --write docs/parity-gpu.md      on this machine's GPUs, through NCCL

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
from tests.distributed.parity import (
    CI_CASES,
    GPU_LIMITS,
    LIMITS,
    OF_EIGHT,
    OF_MUON,
    Case,
    Setting,
    all_cases,
    covering_cases,
    run_cases,
)

CPU = Setting()
Done = list[tuple[Case, dict[str, Any]]]


def run_all(
    cases: list[Case], setting: Setting = CPU, at_once: int = 12, floors: dict[Case, dict] | None = None
) -> Done:
    """Every case with its result, failures first.

    Args:
        floors: results of networks alone, by network, where they are the measure.
    """
    by_size = defaultdict(list)
    for case in cases:
        by_size[case.processes].append(case)
    done = []
    for size, group in sorted(by_size.items()):
        for start in range(0, len(group), at_once):
            part = group[start : start + at_once]
            measures = [(floors or {}).get(case.alone()) for case in part]
            began, limit = time.time(), 60 + (10 if setting.on_gpu else 40) * len(part)
            try:
                results = launch(size, run_cases, part, setting, measures, timeout=limit, on_gpu=setting.on_gpu)[0]
            except (AssertionError, UserError) as error:
                if len(part) > 1:  # find out which of them it was
                    print(f"{len(part)} cases on {size} processes, {setting}: {error}", file=sys.stderr, flush=True)
                    done += run_all(part, setting, 1, floors)
                    continue
                results = [{"failed": ["crashed"], "error": str(error)[-1500:]}]
            done += zip(part, results, strict=True)
            for case, result in zip(part, results, strict=True):
                if result["failed"]:
                    print(case, setting, result, file=sys.stderr)
            print(
                f"{len(part)} cases on {size} processes, {setting}: {time.time() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
    return sorted(done, key=lambda pair: not pair[1]["failed"])


GPU_SETTINGS = {
    "fp32": Setting(True, "fp32"), "bf16": Setting(True, "bf16"), "graphs": Setting(True, "bf16", graphs=True)
}  # fmt: skip


def run_on_gpus(cases: list[Case], names: list[str]) -> dict[Setting, Done]:
    """The cases that this machine's GPUs can hold, in each setting those that it allows."""
    cases = [case for case in cases if 1 < case.processes <= torch.cuda.device_count()]
    done = {}
    for setting in map(GPU_SETTINGS.__getitem__, names):
        ours = [c for c in cases if c.graphable or not setting.graphs]
        done[setting] = run_bf16(ours, setting) if setting.precision == "bf16" else run_all(ours, setting)
    return done


def run_bf16(cases: list[Case], setting: Setting) -> Done:
    """Each case measured by its network alone; behind them these networks."""
    cases = [case for case in cases if case.zero]  # bf16 is refused at stage 0
    alone = run_all(sorted({case.alone() for case in cases}, key=str), setting)
    floors = {case: result for case, result in alone if "error" not in result}
    return run_all(cases, setting, floors=floors) + alone


def table(done: list[tuple[Case, dict[str, Any]]]) -> str:
    """Markdown, failures first."""
    names = [f.name for f in fields(Case)]
    head = ["", *names, "loss, step 1", "norm, step 1", "gradients", "losses", "norms", "weights", "selections"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for case, r in done:
        cells = ["**" + ", ".join(r["failed"]) + "**" if r["failed"] else "ok", *(str(getattr(case, n)) for n in names)]
        if "error" in r:
            cells += ["crashed", *[""] * 6]
        else:
            cells += [f"{r[k]:.1e}" for k in ("loss1", "norm1", "grad", "losses", "norm", "weights")]
            cells.append(r["selections"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ci", action="store_true", help="the small set of cases")
    parser.add_argument("--gpus", nargs="*", choices=GPU_SETTINGS, help="on GPUs, one a process (default: all three)")
    parser.add_argument("--more", type=int, default=0, help="this many cases besides, drawn from all possible ones")
    parser.add_argument("--write", type=Path, help="write the table to this Markdown file")
    args = parser.parse_args()
    cases = (
        CI_CASES if args.ci else list(dict.fromkeys(covering_cases() + OF_MUON + OF_EIGHT + all_cases()[: args.more]))
    )
    on_gpus = args.gpus is not None
    by_setting = run_on_gpus(cases, args.gpus or list(GPU_SETTINGS)) if on_gpus else {CPU: run_all(cases)}
    failures = 0
    for setting, done in by_setting.items():
        bad = [(case, r) for case, r in done if r["failed"]]
        failures += len(bad)
        for case, r in bad:
            print(f"FAILED {case}, {setting}: {r['failed']} {r.get('worst', '')}\n{r.get('error', '')}", flush=True)
        print(f"{setting}\n{table(done)}")
        print(f"{len(done) - len(bad)} of {len(done)} layouts compute the same as one process", flush=True)
    if args.write:
        args.write.write_text(document(args, by_setting))
    return failures > 0


def document(args: argparse.Namespace, by_setting: dict[Setting, Done]) -> str:
    """The page with the tables of all settings."""
    on_gpus = args.gpus is not None
    gpus = " ".join(["", "--gpus", *args.gpus]) if on_gpus else ""
    command = "python -m tests.distributed.matrix" + (" --ci" if args.ci else "") + gpus
    command += f" --more {args.more}" if args.more else ""
    where = f"{platform.machine()} CPU, gloo, float32"
    if on_gpus:
        where = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}, NCCL"
    text = (
        "# Parity: every layout against one process\n\n"
        f"`{command} --write {args.write}`, {time.strftime('%Y-%m-%d')}, torch {torch.__version__}, {where}.\n\n"
        f"Relative differences, the worst of each kind; limits in float32: {GPU_LIMITS if on_gpus else LIMITS}."
        " The top of `tests/distributed/parity.py` says how each is computed.\n"
    )
    for setting, done in by_setting.items():
        good = sum(not r["failed"] for _, r in done)
        text += f"\n## {setting}: {good} of {len(done)} cases pass\n\n"
        if setting.precision == "bf16":
            text += "The last rows are the networks on one process, whose differences are the measure.\n\n"
        text += table(done)
    return text


if __name__ == "__main__":
    sys.exit(main())
